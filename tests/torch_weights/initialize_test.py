"""Training that starts from imported weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import checkpoint, sharding
from argenseg_jax.config import ConfigError
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import base
from argenseg_jax.torch_weights import importing
from argenseg_jax.training import initialize


@pytest.fixture
def config():
  c = base.get_config()
  c.model.variant = ""
  c.data.path = "pictures.jsonl"
  return run_config(c)


@pytest.mark.slow
def test_the_model_of_an_imported_checkpoint(
  tmp_path, tiny, folder, config, mesh
):
  authors, start = folder(tiny.whole()), str(tmp_path / "start")
  (authors / "preprocessor_config.json").write_text("{}")
  importing.import_weights(authors, start, mesh=mesh)
  model = initialize.model_config(config, start)
  assert model == tiny.whole()
  changed = dataclasses.replace(
    config, model=dataclasses.replace(config.model, overrides=("llm.pad_id=3",))
  )
  assert initialize.model_config(changed, start).llm.pad_id == 3
  with pytest.raises(checkpoint.CheckpointError, match="no text tokenizer"):
    initialize.text_tokenizer(config, model, start)

  _, variables = sharding.create_sharded(
    checkpoint.model_factory("mllm", model), mesh
  )
  filled = initialize.fill(variables, start, "mllm", mesh)
  imported = nnx.state(checkpoint.load(start, mesh=mesh).model)
  kernel = filled["llm"]["layers"]["mlp"]["up"]["kernel"].get_value()
  assert kernel.dtype == jnp.float32  # As training asked, not as stored.
  stored = imported["llm"]["layers"]["mlp"]["up"]["kernel"].get_value()
  np.testing.assert_array_equal(kernel, stored.astype(jnp.float32))
  assert kernel.sharding == stored.sharding

  initialize.keep_files(start, tmp_path)
  assert (tmp_path / checkpoint.KEPT / "preprocessor_config.json").is_file()


def test_an_empty_variant_needs_a_start(config):
  with pytest.raises(ConfigError, match=r"'model\.variant' is empty"):
    initialize.model_config(config, None)
