"""Devices that you don't have, for compiling ahead of time."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from argenseg_jax.config import ConfigError
from argenseg_jax.kernels.chips import CHIPS, Chip, kind_of

# What libtpu and the CUDA plugin want to know of a host without hardware.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "3",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
_COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}
_EXTRAS = {"tpu": "tpu", "gpu": "cuda12"}


class Topology(NamedTuple):
  """A kind of chip and how many are joined.

  Attributes:
    name: key of `chips.CHIPS`, or "cpu".
    sides: chips along each side of a TPU's torus; one number elsewhere.
    slices: how many of these.
  """

  name: str
  sides: tuple[int, ...]
  slices: int

  @property
  def chip(self) -> Chip | None:
    """Published facts; None for a CPU."""
    return CHIPS.get(self.name)

  @property
  def num_chips(self) -> int:
    return math.prod(self.sides) * self.slices

  @property
  def num_devices(self) -> int:
    """As JAX counts them."""
    return self.num_chips * (self.chip.devices if self.chip else 1)

  def __str__(self) -> str:
    text = f"{self.name}:{'x'.join(map(str, self.sides))}"
    return text if self.slices == 1 else f"{self.slices} x {text}"


def parse(text: str, slices: int = 1) -> Topology:
  """ "v5p:4x4x4", "h100:8" or "cpu:8".

  Raises:
    config.ConfigError: anything else.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
  names = ("cpu", *CHIPS)
  if not match or match[1] not in names or slices < 1:
    raise ConfigError(
      f"topology {text!r} with {slices} slices is none; give CHIP:SIZE such as "
      f"v5p:4x4x4, v5e:16x16, h100:8 or cpu:8, with CHIP one of "
      f"{', '.join(names)}."
    )
  return Topology(match[1], tuple(map(int, match[2].split("x"))), slices)


def prepare(topology: Topology) -> None:
  """Sets up this process; call it before any use of JAX's devices.

  Raises:
    config.ConfigError: the compiler is not installed.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  if topology.name == "cpu":
    jax.config.update("jax_platforms", "cpu")
    if jax.config.values["jax_num_cpu_devices"] != topology.num_chips:
      jax.config.update("jax_num_cpu_devices", topology.num_chips)
    return
  require_compiler(topology)
  os.environ |= ENVIRONMENT
  if CHIPS[topology.name].platform == "tpu":
    jax.config.update("jax_platforms", "cpu")


def require_compiler(topology: Topology) -> None:
  """Refuses topologies that nothing here compiles for.

  Raises:
    config.ConfigError: says what to install.
  """
  if topology.name == "cpu":
    return
  platform = CHIPS[topology.name].platform
  if not has_compiler(platform):
    raise ConfigError(
      f"the compiler for {topology.name} is missing; {install_hint(platform)}"
    )


def has_compiler(platform: str) -> bool:
  """Whether the compiler for "tpu" or "gpu" is installed."""
  return importlib.util.find_spec(_COMPILERS[platform]) is not None


def install_hint(platform: str) -> str:
  """How to install the compiler."""
  package = f"jax[{_EXTRAS[platform]}]=={jax.__version__}"
  return f'install it with: pip install "{package}"'


def devices(
  topology: Topology,
) -> Sequence[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
  """Devices to compile for.

  Raises:
    config.ConfigError: the compiler knows no such topology.
  """
  if topology.name == "cpu":
    return jax.devices("cpu")
  sides = "x".join(map(str, topology.sides))
  options = {"num_slices": topology.slices} if topology.slices > 1 else {}
  try:
    if CHIPS[topology.name].platform == "tpu":
      return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{topology.name}:{sides}", **options
      ).devices
    return topologies.get_topology_desc(
      platform="cuda",
      target_config=gpu_target(topology.name),
      topology=f"{topology.slices}x1x{topology.num_chips // topology.slices}",
    ).devices
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    first = str(error).splitlines()[0]
    raise ConfigError(
      f"the compiler knows no topology {topology}: {first}"
    ) from error


def gpu_target(name: str) -> str:
  """XLA's description of a Hopper board, for compiling without one."""
  chip = CHIPS[name]
  return f"""
platform_name: "CUDA"
device_description_str: "{kind_of(name)}"
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {chip.scratch}
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: {int(chip.bandwidth)}
  device_memory_size: {chip.hbm}
}}
"""
