"""Rows of the layouts in `data.layouts` and a tiny model that takes them."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model
from data import layouts
from flax import nnx

from argenseg_jax import config_parsing, construct
from argenseg_jax.config import DataConfig
from argenseg_jax.data import text
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.models.argenseg import ARGenSeg

_TOKENIZER = text.TextTokenizer()


def write(layout: str, folder: pathlib.Path, **changes) -> RowMaker:
  """Writes a layout; rows of it, by default of 160 positions."""
  config = DataConfig(
    **{
      **layouts.write(layout, folder),
      "sequence_length": 160,
      "image_side": 16,
      "mask_side": 16,
      "mask_channels": 1,
      **changes,
    }
  )
  return of(config)


def of(config: DataConfig) -> RowMaker:
  return RowMaker(
    open_source(config),
    config,
    tokenizer=_TOKENIZER,
    image_tokens=4,
    num_codes=21,
  )


@functools.cache
def model(dtype=jnp.float32, **changes) -> ARGenSeg:
  """Random values everywhere, drawn without compiling anything.

  Args:
    dtype: of the computation.
    **changes: keys of `ModelConfig`, dotted ones too.
  """
  config = config_parsing.replace(tiny_model.config(), changes)
  ids = _TOKENIZER.token_ids
  llm = dataclasses.replace(config.llm, vocab_size=ids.first_code + 11)
  config = dataclasses.replace(config, token_ids=ids, llm=llm)
  made = construct.abstract(
    lambda: ARGenSeg(config, rngs=construct.Rngs(0), dtype=dtype)
  )
  graph, state = nnx.split(made)
  draw = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype), state
  )
  return nnx.merge(graph, state)
