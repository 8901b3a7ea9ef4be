"""What of a config may change under a work directory, and what may not."""

import json

import pytest

from argenseg_jax import config_parsing
from argenseg_jax.config import ConfigError
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.runtime import workdir

SAVED = {"vqvae": 3}


@pytest.fixture
def config(tmp_path):
  values = tiny.get_config()
  values.data.path = "somewhere"
  config = run_config(values)
  workdir.claim(config, tmp_path, saved={})
  return config


def _changed(config, **changes):
  """Dotted keys, with "__" for dots."""
  return config_parsing.replace(
    config, {key.replace("__", "."): value for key, value in changes.items()}
  )


def _kept(folder):
  kept = json.loads((folder / "config.json").read_text())
  kept.pop("history")
  return kept


def test_data_may_change_if_that_is_accepted(config, tmp_path):
  for key, value in (
    ("data.path", "elsewhere"),
    ("data.answer", "<mask>."),
    ("data.warmup_steps", 1),
    ("mllm.train.global_batch_size", 2),
  ):
    other = _changed(config, **{key.replace(".", "__"): value})
    with pytest.raises(ConfigError, match=f"{key}.*--accept_changed_data"):
      workdir.claim(other, tmp_path, saved=SAVED)
    assert _kept(tmp_path) == config_parsing.to_dict(config)
    workdir.claim(other, tmp_path, saved=SAVED, accept_changed_data=True)
    assert _kept(tmp_path) == config_parsing.to_dict(other)
    workdir.claim(config, tmp_path, saved=SAVED, accept_changed_data=True)


def test_settings_may_change_if_that_is_accepted(config, tmp_path):
  other = _changed(
    config,
    mllm__train__steps=5000,
    mllm__optimizer__learning_rate=1e-3,
    vqvae__optimizer__clip_norm=0.5,
    loss__z_loss=0.1,
    eval__max_samples=4,
  )
  with pytest.raises(
    ConfigError, match=r"learning_rate.*accept the change with --change_sett"
  ):
    workdir.claim(other, tmp_path, saved=SAVED, accept_changed_data=True)
  changed = workdir.claim(other, tmp_path, saved=SAVED, change_settings=True)
  assert len(changed) == 5
  assert _kept(tmp_path) == config_parsing.to_dict(other)
  (entry,) = json.loads((tmp_path / "config.json").read_text())["history"]
  assert entry["steps"] == SAVED
  assert entry["changed"]["mllm.train.steps"] == [4000, 5000]
  workdir.claim(other, tmp_path, saved={"vqvae": 4})  # Now they are its own.
  both = _changed(other, data__seed=3, loss__z_loss=0.0)
  flags = "--accept_changed_data --change_settings"
  with pytest.raises(ConfigError, match=flags):
    workdir.claim(both, tmp_path, saved=SAVED)
  workdir.claim(
    both, tmp_path, saved=SAVED, accept_changed_data=True, change_settings=True
  )
  text = (tmp_path / "config.json").read_text()
  assert len(json.loads(text)["history"]) == 2


def test_nothing_else_may_change(config, tmp_path):
  for changes, keys in (
    ({"seed": 1}, "seed"),
    ({"model__overrides": ["llm.width=8"]}, "model.overrides"),
    ({"mllm__optimizer__frozen": []}, "mllm.optimizer.frozen"),
    ({"vqvae__optimizer__ema_decay": 0.9}, "vqvae.optimizer.ema_decay"),
    ({"mllm__train__param_dtype": "bfloat16"}, "mllm.train.param_dtype"),
    ({"tasks": ["vqvae"]}, "tasks"),
  ):
    with pytest.raises(ConfigError, match=f"differs in {keys}") as raised:
      workdir.claim(
        _changed(config, **changes),
        tmp_path,
        saved=SAVED,
        accept_changed_data=True,
        change_settings=True,
      )
    assert "--" not in str(raised.value)


def test_what_changes_no_number_may_change(config, tmp_path):
  other = _changed(
    config,
    data__workers=2,
    data__max_bad_share=0.2,
    eval__batch_size=3,
    mesh__fsdp=2,
    mllm__train__accumulate_steps=2,
    mllm__train__remat="full",
    mllm__train__log_every=1,
    vqvae__train__save_every=0,
    vqvae__train__keep=7,
    vqvae__train__grace_seconds=0,
  )
  workdir.claim(other, tmp_path, saved=SAVED)
  assert _kept(tmp_path) == config_parsing.to_dict(other)


def test_a_run_is_not_made_shorter_than_it_is(config, tmp_path):
  with pytest.raises(ConfigError, match=r"'vqvae.train.steps' is 850, but .*9"):
    workdir.claim(config, tmp_path, saved={"vqvae": 900}, change_settings=True)


def test_before_anything_is_saved_any_config_may_come(config, tmp_path):
  other = _changed(config, seed=5, model__variant="argenseg_1b")
  workdir.claim(other, tmp_path, saved={})
  assert _kept(tmp_path) == config_parsing.to_dict(other)


def test_a_task_that_does_not_run_may_have_any_settings(config, tmp_path):
  """Older directories do not know it at all."""
  path = tmp_path / "config.json"
  path.write_text(json.dumps(_kept(tmp_path) | {"rl": {}, "history": []}))
  other = _changed(config, rl__kl=0.5, rl__optimizer__learning_rate=0.1)
  workdir.claim(other, tmp_path, saved=SAVED)


def test_how_rewards_count_may_change_but_not_what_is_saved(tmp_path):
  values = tiny.get_config()
  values.tasks, values.data.path = ("rl",), "somewhere"
  config = run_config(values)
  workdir.claim(config, tmp_path, saved={})
  saved = {"rl": 3}
  other = _changed(config, rl__clip=0.5, rl__rewards=["iou", "boundary"])
  with pytest.raises(ConfigError, match=r"rl.clip, rl.rewards.*--change_set"):
    workdir.claim(other, tmp_path, saved=saved)
  workdir.claim(other, tmp_path, saved=saved, change_settings=True)
  with pytest.raises(ConfigError, match=r"rl\.kl"):
    workdir.claim(
      _changed(other, rl__kl=0.0), tmp_path, saved=saved, change_settings=True
    )
