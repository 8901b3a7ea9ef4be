"""Configs: strict keys, and every file of configs/ resolves."""

import dataclasses
import functools
import importlib
import itertools
import pathlib
import re
import typing

import pytest

from argenseg_jax import config_parsing, variants
from argenseg_jax.config import ConfigError, ModelChoice, RunConfig
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import base, tiny
from argenseg_jax.model_config import LLMConfig, ModelConfig
from argenseg_jax.ranges import MOST, Range

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
  "name", sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem != "__init__")
)
def test_config_resolves(name):
  values = importlib.import_module(f"argenseg_jax.configs.{name}").get_config()
  values.data.path = "somewhere"
  config = run_config(values)
  if config.model.variant:  # Else the model is that of `init_from`.
    variants.get(config.model.variant, config.model.changes())
  assert set(config_parsing.to_dict(config)) == set(base.get_config())


def test_unknown_key_is_named_with_a_suggestion():
  values = tiny.get_config().to_dict()
  values["mllm"]["optimizer"]["learning_rat"] = 1.0
  with pytest.raises(ConfigError, match=r"learning_rat.*learning_rate"):
    run_config(values)


def test_missing_key_is_named():
  values = tiny.get_config().to_dict()
  del values["mllm"]["train"]["steps"]
  values["data"]["path"] = "x"
  with pytest.raises(
    ConfigError, match=r"missing config key .mllm\.train\.steps."
  ):
    run_config(values)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("mllm.train.steps", "many", "must be int"),
    ("mllm.train.remat", "some", "use 'full', 'offload', 'attention'"),
    ("mllm.train.keep", True, "must be int"),
    ("data.jpeg_quality", 75.5, "must be int"),
    ("data.pad_square", 1, "must be bool"),
    ("data.resize", "nearest", "use 'pillow', 'opencv'"),
    ("data.interactive", "circle", "use '', 'point', 'box'"),
  ],
)
def test_wrong_type_is_named(key, value, message):
  values = tiny.get_config().to_dict()
  values["data"]["path"] = "x"
  *sections, name = key.split(".")
  functools.reduce(dict.get, sections, values)[name] = value
  with pytest.raises(ConfigError, match=f"{key}.*{message}"):
    run_config(values)


def _run(**changes):
  """The quickstart's config with dotted keys changed ("__" for dots)."""
  values = tiny.get_config().to_dict()
  values["data"]["path"] = "x"
  for key, value in changes.items():
    *sections, name = key.split("__")
    functools.reduce(dict.get, sections, values)[name] = value
  return run_config(values)


@pytest.mark.parametrize(
  ("key", "value", "allowed"),
  [
    ("seed", -1, "0 to 2147483647"),
    ("seed", 2**40, "0 to 2147483647"),
    ("mllm.train.steps", 0, f"1 to {MOST}"),
    ("mllm.train.steps", 10**30, f"1 to {MOST}"),
    ("mllm.train.global_batch_size", 0, f"1 to {MOST}"),
    ("mllm.train.accumulate_steps", 0, f"1 to {MOST}"),
    ("vqvae.train.keep", 0, f"1 to {MOST}"),
    ("vqvae.train.save_every", -5, f"0 to {MOST}"),
    ("mllm.train.grace_seconds", float("nan"), "0 or more"),
    ("mllm.optimizer.learning_rate", float("nan"), "more than 0"),
    ("mllm.optimizer.learning_rate", float("inf"), "more than 0"),
    ("mllm.optimizer.learning_rate", -1e-3, "more than 0"),
    ("mllm.optimizer.clip_norm", -1.0, "0 or more"),
    ("mllm.optimizer.warmup_steps", -3, f"0 to {MOST}"),
    ("mllm.optimizer.b1", 1.0, "0 or more and less than 1"),
    ("mllm.optimizer.b2", -0.1, "0 or more and less than 1"),
    ("mllm.optimizer.eps", 0.0, "more than 0"),
    ("vqvae.optimizer.ema_decay", 1.5, "0 or more and less than 1"),
    ("loss.drop_scale_inputs", 2.0, "0 to 1"),
    ("eval.batch_size", 0, f"1 to {MOST}"),
    ("eval.max_samples", -1, f"0 to {MOST}"),
    ("mesh.fsdp", 0, f"-1, or 1 to {MOST}"),
    ("tokenizer_training.entropy_every", -1, f"0 to {MOST}"),
    ("data.jpeg_quality", 101, "0 to 100"),
    ("data.mask_intermediate_side", -1, f"1 to {MOST}"),
    ("data.mask_channels", 2, "1, 3"),
    ("data.max_bad_share", float("nan"), "0 to 1"),
    ("data.max_masks", -1, f"0 to {MOST}"),
    ("data.pack", 0, f"1 to {MOST}"),
    ("data.workers", -1, f"0 to {MOST}"),
  ],
)
def test_numbers_out_of_range_are_named(key, value, allowed):
  said = re.escape(f"config key '{key}' is {value}; use {allowed}.")
  with pytest.raises(ConfigError, match=f"^{said}$"):
    _run(**{key.replace(".", "__"): value})


def test_zero_switches_off():
  keys = (
    "mllm__train__log_every",
    "mllm__train__eval_every",
    "mllm__train__save_every",
    "mllm__train__max_skipped",
    "mllm__optimizer__clip_norm",
    "mllm__optimizer__warmup_steps",
    "tokenizer_training__entropy_every",
    "tokenizer_training__revive_every",
    "data__prefetch",
  )
  config = _run(**dict.fromkeys(keys, 0))
  for key in keys:
    value = functools.reduce(getattr, key.split("__"), config)
    assert value == 0, key


def _hints(cls, where=""):
  """Dotted keys of a run and their types."""
  hints = typing.get_type_hints(cls, include_extras=True)
  for name, hint in hints.items():
    if dataclasses.is_dataclass(hint):
      yield from _hints(hint, f"{where}{name}.")
    else:
      yield f"{where}{name}", hint


def test_every_number_of_a_run_has_a_range():
  numbers = [
    (key, hint)
    for key, hint in _hints(RunConfig)
    for inner in (hint, *typing.get_args(hint))
    if inner in (int, float)
  ]
  assert [
    key
    for key, hint in numbers
    if not any(isinstance(a, Range) for a in hint.__metadata__)
  ] == []
  assert len(numbers) > 60


def test_types_have_the_defaults_of_base():
  """Where a type has a default at all, for data that no run reads."""
  values = base.get_config()
  config = run_config(values, needs_data=False)
  for group in (config.data, config.loss, config.eval, config.mllm.train):
    for field in dataclasses.fields(group):
      if field.default is not dataclasses.MISSING:
        assert field.default == getattr(group, field.name), field.name


def test_every_key_of_base_has_a_comment():
  lines = (CONFIGS / "base.py").read_text().splitlines()
  bare = [
    line.strip()
    for before, line in itertools.pairwise(lines)
    if re.match(r"  [cs]\.", line)
    and not re.search(r"ConfigDict\(\)|_stage\(|  #", line)
    and not before.lstrip().startswith("#")
  ]
  assert bare == []


@pytest.mark.parametrize("steps", [(3,), (5, 3), (1, 2, 3), (4, 4001)])
def test_what_is_traced_is_two_steps_of_the_run(steps):
  values = tiny.get_config()
  values.data.path = "unused"
  values.mllm.train.profile_steps = (3, 3)
  assert run_config(values).mllm.train.profile_steps == (3, 3)
  values.mllm.train.profile_steps = steps
  with pytest.raises(ConfigError, match=r"profile_steps.*from 1 to 4000"):
    run_config(values)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mllm__train__eval_every": 0}, "no step before the last .4000. is both"),
    ({"mllm__train__save_every": 0}, "no step before the last"),
    ({"mllm__train__eval_every": 999}, "no step before the last"),
    ({"vqvae__train__best_by": "ciou", "vqvae__train__keep_best": 1}, "no st"),
  ],
)
def test_the_best_by_what_is_not_measured_is_refused(changes, message):
  best = {"mllm__train__best_by": "ciou", "mllm__train__keep_best": 1}
  _run(**best)
  with pytest.raises(
    ConfigError, match=rf"train\.best_by' is 'ciou'.*{message}"
  ):
    _run(**(best | changes))


def test_no_task_is_named():
  with pytest.raises(ConfigError, match="'tasks' is empty"):
    _run(tasks=())


def test_no_data_is_named():
  with pytest.raises(ConfigError, match=r"data\.path"):
    run_config(tiny.get_config())


def test_replace_takes_dotted_keys_and_refuses_unknown_ones():
  model = variants.get("tiny", {"llm.num_layers": 5})
  assert model.llm.num_layers == 5
  with pytest.raises(ConfigError, match=r"llm\.depth"):
    variants.get("tiny", {"llm.depth": 5})
  with pytest.raises(ConfigError, match="unknown model variant 'huge'"):
    variants.get("huge")


def test_overrides_are_literals_or_text():
  choice = ModelChoice("tiny", ("llm.num_layers=2", "vision.stem=patch"))
  model = variants.get(choice.variant, choice.changes())
  assert (model.llm.num_layers, model.vision.stem) == (2, "patch")
  with pytest.raises(ConfigError, match="KEY=VALUE"):
    ModelChoice("tiny", ("llm.num_layers",)).changes()


def test_round_trip_through_json_shapes():
  model = variants.get("argenseg_8b")
  values = config_parsing.to_dict(model)
  assert config_parsing.from_mapping(ModelConfig, values) == model
  assert isinstance(values["vqvae"]["scales"], list)


def test_integers_pass_for_floats():
  llm = config_parsing.to_dict(variants.get("tiny").llm) | {"rope_theta": 10000}
  assert config_parsing.from_mapping(LLMConfig, llm).rope_theta == 10000.0
