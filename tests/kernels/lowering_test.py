"""Kernels at production shapes lower for TPUs, and compile where libtpu is."""

import jax
import pytest

from argenseg_jax.kernels.chips import TPUS
from argenseg_jax.tools import compile_kernels

CASES = {case.name: case for case in compile_kernels.cases()}
SMALLEST = [
  name
  for name in CASES
  if name.startswith("nearest_code (1,") or "(arg-max) (1, 36" in name
]


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_tpu(name):
  case = CASES[name]
  traced = jax.jit(case.function).trace(*case.inputs)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "tpu_custom_call" in text


@pytest.mark.skipif(
  not compile_kernels.has_compiler(), reason="libtpu is not installed"
)
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("name", SMALLEST)
def test_compiles_for_tpu(name, chip):
  compiled = compile_kernels.compile_case(CASES[name], chip)
  assert compiled.memory_analysis().temp_size_in_bytes < 2**20
