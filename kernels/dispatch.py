"""The one place that picks an implementation for a platform."""

import importlib
import re
from types import ModuleType
from typing import Literal, NamedTuple

import jax
from jax.sharding import AxisType
from jax.typing import DTypeLike

Implementation = Literal["reference", "xla", "tpu", "gpu"]

_FILES = {
  "reference": "reference",
  "xla": "xla",
  "tpu": "pallas_tpu",
  "gpu": "pallas_hopper",
}
# Measured on an H100 (docs/benchmarks.md): 2.0 to 3.1 times as fast as blocked
# XLA at 16,384 rows (nearest code) and at both shapes of the loss. Prediction
# won at some shapes and lost at others.
_WIN_ON_HOPPER = ("linear_cross_entropy", "nearest_code")
_HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")


class Target(NamedTuple):
  """The device that a program is traced for."""

  platform: str  # "cpu", "gpu" or "tpu".
  kind: str  # JAX's `device_kind`, such as "TPU v5 lite".


def target() -> Target:
  """The device of the mesh in use, or the default device without a mesh.

  The mesh comes first, so that a program compiled ahead of time for a described
  topology (`jax.set_mesh`) gets that chip's kernels and block sizes.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    device = jax.devices()[0]
  return Target(device.platform, device.device_kind)


def load(
  op: str,
  implementation: str | None,
  *,
  width: int = 0,
  dtype: DTypeLike = "bfloat16",
) -> ModuleType:
  """The module of package `op` that holds `implementation`.

  None stands for the platform's own: the Pallas kernel on a TPU, on a Hopper
  GPU the kernels that won there (`_WIN_ON_HOPPER`), and the blocked XLA form
  anywhere else, also for arrays that a GPU kernel cannot take, and where XLA
  partitions the program over several devices, which it cannot do to a kernel.

  An explicit choice is never replaced by another one: a kernel for an
  accelerator that is not there raises when JAX lowers it, and a GPU kernel
  raises for arrays that it cannot take.

  Raises:
    ValueError: there is no such implementation, or not for this GPU.
  """
  if implementation is None:
    implementation = _own(op, width, dtype)
  if implementation not in _FILES:
    raise ValueError(
      f"{op} has no implementation {implementation!r}; use one of "
      f"{', '.join(_FILES)}, or None for the platform's own (xla on GPUs)."
    )
  platform, kind = target()
  on_gpu = implementation == "gpu" and platform == "gpu"
  if on_gpu and not _HOPPER.search(kind):
    raise ValueError(
      f"the GPU kernel of {op} needs a Hopper GPU (H100, H200), and this is "
      f"{kind!r}; use implementation='xla'."
    )
  file = _FILES[implementation]
  return importlib.import_module(f"argenseg_jax.kernels.{op}.{file}")


def _own(op: str, width: int, dtype: DTypeLike) -> Implementation:
  platform, kind = target()
  if partitioned():
    return "xla"
  if platform == "tpu":
    return "tpu"
  if platform == "gpu" and _HOPPER.search(kind) and op in _WIN_ON_HOPPER:
    from argenseg_jax.kernels import hopper

    if hopper.refusal(width, jax.numpy.dtype(dtype)) is None:
      return "gpu"
  return "xla"


def copies_stacks() -> bool:
  """Whether a loop over stacked layers copies each layer's weights first.

  XLA does so on CPUs and GPUs, where it triples the bytes of a pass of few
  tokens (docs/benchmarks.md); TPUs read the stack itself.
  """
  return target().platform != "tpu"


def copies_slices() -> bool:
  """Whether a program copies the slices that it takes of its inputs."""
  return target().platform == "gpu"


def partitioned() -> bool:
  """Whether XLA partitions the program over devices (outside `shard_map`)."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(
    mesh.shape[name] > 1 and kind != AxisType.Manual
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
  )
