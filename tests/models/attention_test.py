"""Attention against JAX's own, which normalises before the values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.models import layers


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_softmax_attention(kv_heads, masked):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (2, 5, 4, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8)
  inputs = [
    5 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)
  ]
  mask = None
  if masked:  # Every query sees the first key at least.
    mask = jax.random.bernoulli(keys[3], 0.5, (2, 5, 7)).at[:, :, 0].set(True)

  def reference(q, k, v):
    whole = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=whole)

  def of(attend):
    def loss(*x):
      return jnp.sum(attend(*x) ** 2)

    return attend(*inputs), jax.grad(loss, argnums=(0, 1, 2))(*inputs)

  mine = of(lambda *x: layers.attend(*x, mask=mask))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3),
    mine,
    of(reference),
  )


def test_a_query_without_keys_gets_the_mean_of_all_values():
  q, k, v = (
    jax.random.normal(jax.random.key(i), (1, 3, 2, 4)) for i in range(3)
  )
  out = layers.attend(q, k, v, mask=jnp.zeros((1, 3, 3), bool))
  mean = jnp.broadcast_to(jnp.mean(v, 1, keepdims=True), v.shape)
  np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-6)
