"""Kernels at production shapes lower, and compile where the compilers are."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from argenseg_jax import topology
from argenseg_jax.kernels.chips import TPUS
from argenseg_jax.kernels.linear_cross_entropy.sharded import (
  sharded_linear_cross_entropy,
)
from argenseg_jax.kernels.scale_prediction.sharded import (
  sharded_scale_prediction,
)
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
  not topology.has_compiler("tpu"), reason="libtpu is not installed"
)
def test_sharded_forms_compile_for_tpu():
  def loss(*arrays):
    return sharded_linear_cross_entropy(*arrays, implementation="tpu").sum()

  def predict(hidden, head, codebook, key):
    key = jax.random.wrap_key_data(key)
    return sharded_scale_prediction(
      hidden, head, codebook, key=key, temperature=1.0, implementation="tpu"
    )

  os.environ.update(topology.ENVIRONMENT)
  described = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2"
  )
  devices = np.asarray(described.devices).reshape(1, 2, 2)
  mesh = Mesh(devices, ("data", "fsdp", "tensor"))

  def struct(dtype, *shape, spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

  rows = ("data", "fsdp")
  loss_inputs = (
    struct("bfloat16", 1024, 512, spec=(rows,)),
    struct("bfloat16", 9030, 512, spec=("tensor", "fsdp")),
    struct("int32", 1024, spec=(rows,)),
    struct("float32", 1024, spec=(rows,)),
  )
  prediction_inputs = (
    struct("bfloat16", 2, 36, 512, spec=(rows,)),
    struct("bfloat16", 4096, 512, spec=("tensor",)),
    struct("float32", 4096, 32, spec=()),
    struct("uint32", 2, spec=()),
  )
  with jax.set_mesh(mesh):
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for function, inputs in (
      (gradient, loss_inputs),
      (jax.jit(predict), prediction_inputs),
    ):
      text = function.lower(*inputs).compile().as_text()
      assert "tpu_custom_call" in text


@pytest.mark.skipif(
  not topology.has_compiler("gpu"), reason="no CUDA plugin is installed"
)
@pytest.mark.parametrize("name", GPU_KINDS)
def test_compiles_for_gpu(name):
  case = GPU_CASES[name]
  compiled = compile_kernels.compile_for("h100", case.function, case.inputs)
  assert compiled.memory_analysis().temp_size_in_bytes < case.avoided / 2
