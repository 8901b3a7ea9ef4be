"""Runs Mosaic GPU kernels on the CPU, for tests.

JAX's interpreter of GPU kernels (0.10) lacks three things that the kernels of
`hopper` need; they are added here.
"""

import contextlib
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.interpret import (
  gpu_callbacks,
  interpret_pallas_call,
)
from jax._src.pallas.mosaic_gpu.interpret.params import (
  InterpretGPUParams,
  force_gpu_interpret_mode,
)
from jax._src.state.types import TransposeTransform

from argenseg_jax.kernels import hopper


@contextlib.contextmanager
def gpu_interpreter(**options):
  """Interprets GPU kernels that are traced inside.

  Args:
    options: those of JAX's `InterpretGPUParams`.
  """
  with (
    mock.patch.object(gpu_callbacks, "wgmma", _multiply),
    mock.patch.object(gpu_callbacks, "_handle_out_of_bounds_read", _zeros),
    # Two views of the same bytes: the interpreter keeps no bytes, but arrays.
    mock.patch.object(hopper, "_ring", hopper._swizzled),
    mock.patch.object(hopper, "_views", lambda ring: (ring, ring)),
    # So few that a thread block has several blocks to do.
    mock.patch.object(hopper, "_PROCESSORS", 2),
    force_gpu_interpret_mode(InterpretGPUParams(**options)),
  ):
    yield


def races_found() -> bool:
  """Whether the last interpreted kernel raced with itself."""
  return interpret_pallas_call.get_races().races_found


def _multiply(
  *,
  token,
  device_id,
  grid_point_coords,
  thread_id,
  acc_allocation_key_as_array,
  acc_transforms,
  acc_dtype,
  a_allocation_key_as_array,
  a_transforms,
  b_allocation_key_as_array,
  b_transforms,
  source_info=None,
):
  """wgmma whose second operand is transposed."""
  memory = gpu_callbacks._get_shared_memory()
  thread = memory.get_global_thread_id(int(device_id), int(thread_id))
  info = utils.GPULoggingInfo(
    device_id=int(device_id),
    grid_point_coords=tuple(int(x) for x in grid_point_coords),
    thread_id=int(thread_id),
    source_info=source_info,
  )
  *b_transforms, transpose = gpu_callbacks._remove_noop_transforms(b_transforms)
  assert isinstance(transpose, TransposeTransform)

  def place(key, transforms):
    transforms = gpu_callbacks._remove_noop_transforms(tuple(transforms))
    transforms = jax.tree.map(int, transforms)
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    return key, utils.to_range(transforms)

  def read(key, where):
    return memory.get_buffer_content(key, where, thread, logging_info=info)[0]

  total = place(acc_allocation_key_as_array, acc_transforms)
  # In float64: a processor's float32 product may round equal columns apart.
  a = read(*place(a_allocation_key_as_array, a_transforms)).astype(np.float64)
  b = read(*place(b_allocation_key_as_array, b_transforms)).astype(np.float64)
  result = read(*total) + (a @ b.T).astype(acc_dtype)
  memory.store_buffer_content(*total, result, thread, logging_info=info)
  return token


def _zeros(found, shape, _, dtype, *rest):
  """What TMA reads outside of an array."""
  del rest
  result = np.zeros(shape, dtype)
  if found is not None:
    result[tuple(map(slice, found.shape))] = found
  return result
