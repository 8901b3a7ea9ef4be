"""The one place that picks an implementation for a platform."""

import importlib
from types import ModuleType
from typing import Literal, NamedTuple

import jax
from jax.sharding import AxisType

Implementation = Literal["reference", "xla", "tpu", "gpu"]

_FILES = {
  "reference": "reference",
  "xla": "xla",
  "tpu": "pallas_tpu",
  "gpu": "pallas_gpu",
}
_OPS = {
  "linear_cross_entropy": ("reference", "xla"),
  "nearest_code": ("reference", "xla"),
  "scale_prediction": ("reference", "xla"),
}


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


def load(op: str, implementation: Implementation | None) -> ModuleType:
  """The module of `op` that holds `implementation`; None picks by platform.

  An explicit choice is never replaced by another one: a kernel named on a
  platform that cannot run it raises, here or when JAX lowers it.

  Raises:
    ValueError: `op` has no such implementation.
  """
  name = _automatic(op) if implementation is None else implementation
  if name not in _OPS[op]:
    raise ValueError(
      f"{op} has no implementation {name!r}; use one of "
      f"{', '.join(_OPS[op])}, or None to pick by platform."
    )
  return importlib.import_module(f"argenseg_jax.kernels.{op}.{_FILES[name]}")


def _automatic(op: str) -> Implementation:
  platform, kind = target()
  if _partitioned():
    return "xla"
  if platform == "tpu" and "tpu" in _OPS[op]:
    return "tpu"
  hopper = any(name in kind for name in ("H100", "H200", "GH200"))
  if platform == "gpu" and hopper and "gpu" in _OPS[op]:
    return "gpu"
  return "xla"


def _partitioned() -> bool:
  """Whether XLA partitions the program, which it cannot do to a kernel."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(
    mesh.shape[name] > 1 and kind != AxisType.Manual
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
  )
