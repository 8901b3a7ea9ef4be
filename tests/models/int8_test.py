"""Eight-bit weights: near the matrices, and used as numbers times scales."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.models import int8, layers
from argenseg_jax.models.llm import Decoder

# Half a step of int8 at the peak; e4m3 has 3 bits of mantissa.
ERRORS = {"int8": 0.5 / 127, "float8_e4m3fn": 2**-4}


@pytest.mark.parametrize("weights", typing.get_args(int8.Weights))
def test_numbers_times_scales_are_the_matrix(weights):
  matrix = jax.random.normal(jax.random.key(0), (3, 8, 5))
  matrix = matrix.at[0, :, 1].set(0.0)
  numbers, scales = int8.eight_bits(matrix, -2, weights)
  assert numbers.dtype == weights
  assert scales.shape == (3, 5)
  back = numbers.astype(jnp.float32) * scales[:, None]
  peak = jnp.max(jnp.abs(matrix), -2, keepdims=True)
  assert np.all(jnp.abs(back - matrix) <= ERRORS[weights] * peak + 1e-6)


def decoder(tied: bool) -> Decoder:
  return nnx.merge(*_parts(tied))


@functools.cache
def _parts(tied):
  config = dataclasses.replace(
    tiny_model.config().llm, tied_head=tied, qkv_bias=True
  )
  return jax.jit(lambda: nnx.split(Decoder(config, rngs=construct.Rngs(0))))()


def rounded(llm: Decoder, weights) -> None:
  """Gives a decoder the values that `quantize` would keep, in float32."""

  def back(variable, axis):
    numbers, scales = int8.eight_bits(variable[...], axis, weights)
    wide = numbers.astype(jnp.float32) * jnp.expand_dims(scales, axis)
    variable[...] = wide

  for _, node in nnx.iter_graph(llm):
    if isinstance(node, layers.Linear):
      back(node.kernel, -2)
  tied = llm.untied_head is None
  back(llm.embedding if tied else llm.untied_head, -1)


@pytest.mark.parametrize(
  ("weights", "tied"), [("int8", True), ("float8_e4m3fn", False)]
)
def test_products_are_those_of_the_rounded_matrices(weights, tied):
  found, expected = decoder(tied), decoder(tied)
  int8.quantize(found, weights)
  rounded(expected, weights)

  @jax.jit(static_argnames="graph")
  def outputs(graph, state):
    llm = nnx.merge(graph, state)
    tokens = jnp.asarray([[12, 13, 14, 15]], jnp.int32)
    hidden, _ = llm(
      llm.embed(tokens),
      positions=jnp.arange(4)[None],
      segment_ids=jnp.ones_like(tokens),
    )
    return hidden, llm.logits(hidden[0]), llm.head_rows(20, 11), llm.head

  for a, b in zip(
    outputs(*nnx.split(found)), outputs(*nnx.split(expected)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-4)
  with pytest.raises(ValueError, match="already"):
    int8.quantize(found, weights)


def test_every_matrix_shrinks():
  llm = decoder(tied=False)
  matrices = [x for x in jax.tree.leaves(nnx.state(llm.layers)) if x.ndim == 3]
  table = llm.untied_head.size
  int8.quantize(llm, "int8")
  small = [x for x in jax.tree.leaves(nnx.state(llm)) if x.dtype == jnp.int8]
  assert sum(x.size for x in small) == sum(x.size for x in matrices) + table
  axes = llm.layers.mlp.down.scale.get_metadata("axes")
  assert axes == ("layers", "embed")
  apart = layers.unstack(llm.layers)
  assert apart[1].mlp.down.kernel.dtype == jnp.int8
