"""What of a config may change under a work directory, and what may not."""

import dataclasses
import json

import pytest

from argenseg_jax import config_parsing
from argenseg_jax.config import ConfigError
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.runtime import workdir


@pytest.fixture
def config(tmp_path):
  values = tiny.get_config()
  values.data.path = "somewhere"
  config = run_config(values)
  workdir.claim(config, tmp_path)
  return config


def _data(config, **changes):
  data = dataclasses.replace(config.data, **changes)
  return dataclasses.replace(config, data=data)


def _global_batch(config, size):
  train = dataclasses.replace(config.mllm.train, global_batch_size=size)
  mllm = dataclasses.replace(config.mllm, train=train)
  return dataclasses.replace(config, mllm=mllm)


def _kept(folder):
  return json.loads((folder / "config.json").read_text())


def test_data_may_change_if_that_is_accepted(config, tmp_path):
  for other, key in (
    (_data(config, path="elsewhere"), "data.path"),
    (_data(config, answer="<mask>."), "data.answer"),
    (_global_batch(config, 2), "mllm.train.global_batch_size"),
  ):
    with pytest.raises(ConfigError, match=f"{key}.*--accept_changed_data"):
      workdir.claim(other, tmp_path)
    assert _kept(tmp_path) == config_parsing.to_dict(config)
    workdir.claim(other, tmp_path, accept_changed_data=True)
    assert _kept(tmp_path) == config_parsing.to_dict(other)
    workdir.claim(config, tmp_path, accept_changed_data=True)


def test_nothing_else_may_change(config, tmp_path):
  for other, key in (
    (dataclasses.replace(config, seed=1), "seed"),
    (_data(config, warmup_steps=config.data.warmup_steps + 1), "data.warmup_"),
    (dataclasses.replace(_global_batch(config, 2), seed=1), "mllm.*seed"),
  ):
    for accepted in (False, True):
      with pytest.raises(ConfigError, match=f"differs in {key}") as raised:
        workdir.claim(other, tmp_path, accept_changed_data=accepted)
      assert "--accept_changed_data" not in str(raised.value)


def test_speed_may_change(config, tmp_path):
  faster = _data(config, workers=2, threads=3, prefetch=9, max_bad_share=0.2)
  workdir.claim(faster, tmp_path)
  assert _kept(tmp_path) == config_parsing.to_dict(faster)
