"""Collectives in the form that compilers keep.

XLA for TPUs turns a reduce-scatter over a whole square or cubic slice (and, in
three dimensions, an all-gather) into an all-reduce of the whole array. What was
tried against that, and what came of it, stands in docs/scale.md.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from argenseg_jax.kernels import chips, dispatch

_PLAIN = "v5e"  # The chip without SparseCores.
_PREFER_GATHERS = {"xla_tpu_prefer_async_allgather_to_allreduce": True}
# SparseCores run collectives over two and three dimensions.
_OFFLOAD = {
  "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}


def compiler_options(device_kind: str) -> dict[str, bool]:
  """XLA's options for programs that gather and scatter over many chips.

  Args:
    device_kind: JAX's name of the devices that the program is compiled for.
  """
  name = chips.name_of(device_kind)
  if name not in chips.TPUS:
    return {}
  return _PREFER_GATHERS | (_OFFLOAD if name != _PLAIN else {})


def sum_over(
  x: Shaped[Array, "..."], axis_names: Sequence[str]
) -> Shaped[Array, "..."]:
  """`lax.psum` over mesh axes, inside `jax.shard_map`."""
  return lax.psum(_addends(x), axis_names).astype(x.dtype)


def scatter_sum(
  x: Shaped[Array, "..."],
  axis_name: str,
  dimension: int,
  *,
  sides: tuple[int, ...] | None = None,
) -> Shaped[Array, "..."]:
  """Sum over a mesh axis, of which each device keeps its part of `dimension`.

  The same as a tiled `lax.psum_scatter`. XLA for TPUs reduces the whole array
  everywhere and slices it when the scattered dimension is not the first; so the
  parts become a first dimension of their own.

  Args:
    x: one addend, whole.
    axis_name: inside `jax.shard_map`; its size divides the dimension.
    dimension: that is scattered.
    sides: the axis in row-major order of these sides; the sum runs along one
      side after the other. None takes what the chip in use needs.
  """
  size = lax.axis_size(axis_name)
  sides = _sides(size) if sides is None else sides
  dtype, x = x.dtype, _addends(x)
  before, after = x.shape[:dimension], x.shape[dimension + 1 :]
  if dimension or len(sides) > 1:
    x = jnp.moveaxis(x.reshape(*before, size, -1, *after), dimension, 0)
  for groups in _groups(sides):
    x = lax.psum_scatter(
      x,
      axis_name,
      scatter_dimension=0,
      axis_index_groups=groups,
      tiled=True,
    )
  return x.reshape(*before, -1, *after).astype(dtype)


def _addends(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
  """In float32 on a CPU, if they have 16 bits.

  XLA for CPUs sums such numbers in float32 anyway; but where it splits another
  axis of the mesh by itself, its own widening ends the process (jaxlib 0.10.2:
  "Invalid binary instruction opcode copy").
  """
  narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
  if narrow and dispatch.target().platform == "cpu":
    return x.astype(jnp.float32)
  return x


def _sides(size: int) -> tuple[int, ...]:
  """Of an axis over a whole slice: a v5e's square one goes side by side."""
  side = math.isqrt(size)
  if (
    chips.name_of(dispatch.target().kind) == _PLAIN and side * side == size > 4
  ):
    return (side, side)
  return (size,)


def _groups(sides: tuple[int, ...]) -> list[list[list[int]] | None]:
  """For each side, the positions along the axis that differ in it alone."""
  if len(sides) == 1:
    return [None]  # Everyone.
  positions = np.arange(math.prod(sides)).reshape(sides)
  return [
    np.moveaxis(positions, i, -1).reshape(-1, side).tolist()
    for i, side in enumerate(sides)
  ]
