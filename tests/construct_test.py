"""Constructed modules keep Flax's values; their shapes cost no initializer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.models import layers


def test_keys_are_those_of_flax():
  ours, theirs = construct.Rngs(3), nnx.Rngs(3)
  for _ in range(130):
    key = jax.random.key_data(ours.params())
    np.testing.assert_array_equal(key, jax.random.key_data(theirs.params()))


def test_stacked_layers_have_the_values_that_flax_gives_them():
  def make(rngs):
    return layers.Linear(3, 4, axes=("embed", "mlp"), rngs=rngs)

  @nnx.split_rngs(splits=2)
  @nnx.vmap(in_axes=(0,), out_axes=0)
  def theirs(rngs):
    return nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (3, 4)))

  stacked = layers.stack(make, 2, construct.Rngs(5))
  np.testing.assert_array_equal(stacked.kernel[...], theirs(nnx.Rngs(5))[...])


def test_an_abstract_module_has_the_shapes_and_runs_no_initializer():
  def init(key, shape, dtype):
    pytest.fail("An initializer was traced.")

  class Module(nnx.Module):
    def __init__(self, width):
      rngs = construct.Rngs(0)
      self.scale = layers.param(rngs, (width,), ("a",), init, jnp.bfloat16)

  made = construct.abstract(lambda: Module(3))
  assert made.scale.shape == (3,)
  assert made.scale.dtype == jnp.bfloat16
  assert made.scale.get_metadata("axes") == ("a",)
  with pytest.raises(pytest.fail.Exception, match="initializer"):
    Module(3)
