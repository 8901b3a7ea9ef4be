"""Kernels at production shapes lower, and compile where the compilers are."""

import jax
import pytest

from argenseg_jax.kernels.chips import TPUS
from argenseg_jax.planning import topology
from argenseg_jax.tools import compile_kernels

TPU_CASES = {case.name: case for case in compile_kernels.cases("tpu")}
GPU_CASES = {case.name: case for case in compile_kernels.cases("gpu")}
SMALLEST = [
  name
  for name in TPU_CASES
  if name.startswith("nearest_code (1,") or "(arg-max) (1, 36" in name
]
SMALLEST.append("linear_cross_entropy + gradients (8192, 4096, 96653)")
# Lowering takes a second or two, and hardly depends on the shape.
GPU_KINDS = [
  name
  for name in GPU_CASES
  if any(
    kind in name
    for kind in (
      "gradients (8192, 4096",
      "(arg-max) (1, 36",
      "(sampled) (1, 36",
      "nearest_code (1352",
    )
  )
]


def lowered(case, platform):
  traced = jax.jit(case.function).trace(*case.inputs)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", TPU_CASES)
def test_lowers_for_tpu(name):
  assert "tpu_custom_call" in lowered(TPU_CASES[name], "tpu")


@pytest.mark.parametrize("name", GPU_KINDS)
def test_lowers_for_gpu(name):
  assert "mosaic_gpu" in lowered(GPU_CASES[name], "cuda")


@pytest.mark.slow
@pytest.mark.skipif(
  not topology.has_compiler("tpu"), reason="libtpu is not installed"
)
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("name", SMALLEST)
def test_compiles_for_tpu(name, chip):
  case = TPU_CASES[name]
  compiled = compile_kernels.compile_for(chip, case.function, case.inputs)
  # Some compilers copy narrow arrays into rows of 128 lanes: 4 MiB a codebook.
  limit = max(5 * 2**20, case.avoided // 50)
  assert compiled.memory_analysis().temp_size_in_bytes < limit


@pytest.mark.skipif(
  not topology.has_compiler("gpu"), reason="no CUDA plugin is installed"
)
@pytest.mark.parametrize("name", GPU_KINDS)
def test_compiles_for_gpu(name):
  case = GPU_CASES[name]
  compiled = compile_kernels.compile_for("h100", case.function, case.inputs)
  assert compiled.memory_analysis().temp_size_in_bytes < case.avoided / 2
