"""Sharded kernels on eight devices against the unsharded ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.kernels.linear_cross_entropy.sharded import (
  Layout,
  sharded_linear_cross_entropy,
)
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.kernels.scale_prediction.sharded import (
  sharded_scale_prediction,
)

AXES = ("data", "fsdp", "tensor")


def use_mesh(*sides):
  mesh = jax.make_mesh(sides, AXES, axis_types=(AxisType.Auto,) * 3)
  return jax.set_mesh(mesh)


def normal(seed, *shape):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def loss_inputs():
  rng = np.random.default_rng(0)
  targets = jnp.asarray(rng.integers(0, 72, 64), jnp.int32)
  weights = jnp.asarray(rng.uniform(0, 1, 64), jnp.float32)
  weights, targets = weights.at[3].set(0.0), targets.at[3].set(-5)
  return normal(1, 64, 16), normal(2, 72, 16), targets, weights


def gradient_of(function, **options):
  def total(hidden, head, targets, weights):
    losses = function(hidden, head, targets, weights, z_loss=0.01, **options)
    return jnp.sum(losses * jnp.arange(64.0)), losses

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 3), has_aux=True))


@pytest.mark.parametrize("sides", [(2, 4, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_loss(sides):
  inputs = loss_inputs()
  expected = gradient_of(linear_cross_entropy, implementation="reference")(
    *inputs
  )
  with use_mesh(*sides):
    actual = gradient_of(sharded_linear_cross_entropy)(*inputs)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(
      a, e, rtol=2e-5, atol=1e-5 * float(jnp.abs(e).max())
    ),
    actual,
    expected,
  )


def test_head_is_gathered_once_and_its_gradient_scattered_once():
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in loss_inputs()]
  with use_mesh(1, 8, 1):
    compiled = gradient_of(
      sharded_linear_cross_entropy, layout=Layout(words=None)
    )
    text = compiled.lower(*inputs).compile().as_text()
  counts = {
    op: len(re.findall(rf" {op}(?:-start)?\(", text))
    for op in ("all-gather", "reduce-scatter")
  }
  assert counts == {"all-gather": 1, "reduce-scatter": 1}, text


def test_loss_refuses_layouts():
  inputs = loss_inputs()
  with use_mesh(1, 2, 4):
    with pytest.raises(ValueError, match="must be one of the row axes"):
      sharded_linear_cross_entropy(*inputs, layout=Layout(width="tensor"))
    hidden, head, *rest = inputs
    with pytest.raises(ValueError, match="70 words do not divide over the 4"):
      sharded_linear_cross_entropy(hidden, head[:70], *rest)


@pytest.mark.parametrize(
  ("temperature", "top_k"), [(0.0, None), (0.8, None), (0.8, 13)]
)
@pytest.mark.parametrize("sides", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_prediction(sides, temperature, top_k):
  hidden, codebook = normal(0, 4, 9, 16), normal(2, 64, 6)
  # Every code four times, so that shards tie.
  head = jnp.tile(normal(1, 16, 16), (4, 1))
  key = jax.random.key(4)
  options = {"key": key, "temperature": temperature, "top_k": top_k}
  codes, latents, scores = scale_prediction(
    hidden, head, codebook, return_scores=True, **options
  )
  with use_mesh(*sides):
    predict = jax.jit(
      lambda *arrays: sharded_scale_prediction(*arrays, **options)
    )
    actual = predict(hidden, head, codebook)
  np.testing.assert_array_equal(actual[0], codes)
  np.testing.assert_array_equal(actual[1], latents)
  np.testing.assert_allclose(actual[2].logits, scores.logits, rtol=1e-5)
  np.testing.assert_allclose(
    actual[2].log_sum_exp, scores.log_sum_exp, rtol=1e-5
  )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prediction_of_no_numbers_is_the_id_of_a_code(temperature):
  hidden = normal(0, 4, 9, 8).at[1, 2].set(jnp.nan)
  head, codebook = normal(1, 32, 8), normal(2, 32, 6)
  options = {"key": jax.random.key(0), "temperature": temperature}
  expected, _ = scale_prediction(hidden, head, codebook, **options)
  with use_mesh(1, 2, 4):
    codes, _, _ = jax.jit(
      lambda *arrays: sharded_scale_prediction(*arrays, **options)
    )(hidden, head, codebook)
  finite = jnp.ones((4, 9), bool).at[1, 2].set(False)
  np.testing.assert_array_equal(codes[finite], expected[finite])
  assert 0 <= codes[1, 2] < 32


def test_prediction_refuses():
  hidden, head, codebook = (
    normal(0, 4, 9, 8),
    normal(1, 30, 8),
    normal(2, 30, 6),
  )
  with use_mesh(1, 2, 4):
    with pytest.raises(ValueError, match="30 codes do not divide over the 4"):
      sharded_scale_prediction(hidden, head, codebook)
    with pytest.raises(ValueError, match="random key"):
      sharded_scale_prediction(hidden, head, codebook, temperature=1.0)
    with pytest.raises(ValueError, match=r"top_k 31 is outside 1\.\.30"):
      sharded_scale_prediction(hidden, head, codebook, top_k=31)
    with pytest.raises(ValueError, match="top_k has no 'tpu' form"):
      sharded_scale_prediction(
        hidden, head, codebook, top_k=3, implementation="tpu"
      )
