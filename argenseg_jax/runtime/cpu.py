"""Makes a CPU train on all of its cores.

XLA splits one operation over the cores, which a small model's operations do not
repay: two devices of one core each take the quickstart's batch in 0.85 of the
time that one device of two cores needs (docs/quickstart.md).
"""

import contextlib
import ctypes
import math
import os
from typing import Any

import jax

from argenseg_jax.config import RunConfig

_MAX_DEVICES = 8
# glibc's mallopt: freed memory goes to the next step, not back to the kernel.
_MALLOPT = {
  "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
  "M_MMAP_MAX": (-4, 0),
  "M_ARENA_MAX": (-8, 1),  # Threads' own arenas would give memory back.
}


def use_all_cores(config: RunConfig) -> None:
  """Call before JAX starts: one CPU device a core where the mesh is free.

  Does nothing to a mesh of fixed size, to a device count that the user has
  set, or to runs on an accelerator.
  """
  for option, value in _MALLOPT.values():
    _mallopt(option, value)
  mesh = config.mesh
  is_free = mesh.data == -1 and mesh.fsdp == mesh.tensor == 1
  settings: Any = jax.config  # JAX declares none of its own.
  is_set = settings.jax_num_cpu_devices > 0 or (
    "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  )
  if is_set or not is_free:
    return
  batches = [config.stage(t).train.global_batch_size for t in config.tasks]
  # Once JAX has started, its devices stay as they are.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", num_devices(*batches))


def num_cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # Linux.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def num_devices(*batch_sizes: int) -> int:
  """The largest power of two that the cores allow and that divides batches."""
  power = 2 ** int(math.log2(min(num_cores(), _MAX_DEVICES)))
  return math.gcd(power, *batch_sizes)


def _mallopt(option: int, value: int) -> None:
  with contextlib.suppress(AttributeError, OSError):  # Not glibc.
    ctypes.CDLL(None).mallopt(option, value)
