"""The loss in three products against the definition of correct."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.kernels.linear_cross_entropy.three_products import (
  total_cross_entropy,
)


@pytest.mark.parametrize("chunk", [None, 4])  # One chunk; three, one ragged.
def test_value_and_gradients_are_the_references(chunk):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(10, 8)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(13, 8)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 13, 10), jnp.int32).at[3].set(-7)
  weights = jnp.asarray(rng.uniform(0.5, 2, 10), jnp.float32).at[3].set(0.0)

  def expected(hidden, head):
    losses = linear_cross_entropy(
      hidden, head, targets, weights, z_loss=0.1, implementation="reference"
    )
    return 3.0 * jnp.sum(losses)

  def found(hidden, head):
    return 3.0 * total_cross_entropy(hidden, head, targets, weights, 0.1, chunk)

  value, grads = jax.value_and_grad(found, (0, 1))(hidden, head)
  true_value, true_grads = jax.value_and_grad(expected, (0, 1))(hidden, head)
  np.testing.assert_allclose(value, true_value, rtol=1e-5)
  for a, b in zip(grads, true_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
