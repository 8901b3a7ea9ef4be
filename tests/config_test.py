"""Configs: strict keys, and every file of configs/ resolves."""

import functools
import importlib
import pathlib

import pytest

from argenseg_jax import config as config_lib
from argenseg_jax import variants
from argenseg_jax.config import (
  ConfigError,
  LLMConfig,
  ModelChoice,
  ModelConfig,
  run_config,
)
from argenseg_jax.configs import base, tiny

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
  "name", sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem != "__init__")
)
def test_config_resolves(name):
  values = importlib.import_module(f"argenseg_jax.configs.{name}").get_config()
  values.data.path = "somewhere"
  config = run_config(values)
  variants.get(config.model.variant, config.model.changes())
  assert set(config_lib.to_dict(config)) == set(base.get_config())


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
    ("mllm.train.remat", "some", "use 'none', 'full', 'dots'"),
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
  values = config_lib.to_dict(model)
  assert config_lib.from_mapping(ModelConfig, values) == model
  assert isinstance(values["vqvae"]["scales"], list)


def test_integers_pass_for_floats():
  llm = config_lib.to_dict(variants.get("tiny").llm) | {"rope_theta": 10000}
  assert config_lib.from_mapping(LLMConfig, llm).rope_theta == 10000.0
