"""Collectives in the form that compilers keep."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def scatter_sum(
  x: Shaped[Array, "..."], axis_name: str, dimension: int
) -> Shaped[Array, "..."]:
  """Sum over a mesh axis, of which each device keeps its part of `dimension`.

  The same as a tiled `lax.psum_scatter`. XLA for TPUs reduces the whole array
  everywhere and slices it when the scattered dimension is not the first; so the
  parts become a first dimension of their own.

  Args:
    x: one addend, whole.
    axis_name: inside `jax.shard_map`; its size divides the dimension.
    dimension: that is scattered.
  """
  if dimension == 0:
    return lax.psum_scatter(x, axis_name, scatter_dimension=0, tiled=True)
  before, after = x.shape[:dimension], x.shape[dimension + 1 :]
  parts = x.reshape(*before, lax.axis_size(axis_name), -1, *after)
  return lax.psum_scatter(jnp.moveaxis(parts, dimension, 0), axis_name)
