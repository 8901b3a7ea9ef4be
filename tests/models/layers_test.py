"""Layers against their definitions, where goldens are too kind to tell."""

import jax.numpy as jnp
import numpy as np

from argenseg_jax import construct
from argenseg_jax.models import layers


def test_group_norm_takes_off_each_groups_mean():
  x = np.random.default_rng(0).normal(5, 2, (2, 3, 4, 6)).astype(np.float32)
  norm = layers.GroupNorm(6, 3, rngs=construct.Rngs(0))
  groups = x.reshape(2, 12, 3, 2)
  mean = groups.mean((1, 3), keepdims=True)
  spread = np.sqrt(groups.var((1, 3), keepdims=True) + norm.eps)
  wanted = ((groups - mean) / spread).reshape(x.shape)
  np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, atol=1e-5)


def test_positions_name_the_row_first():
  """Another order would turn the masks of models that were trained with it."""
  table = layers.sincos_2d(4, 16, 4).reshape(4, 4, 16)
  rows, columns = table[..., :8], table[..., 8:]
  np.testing.assert_array_equal(rows, rows[:, :1].repeat(4, 1))
  np.testing.assert_array_equal(columns, columns[:1].repeat(4, 0))
  assert len(np.unique(rows[:, 0], axis=0)) == 4
