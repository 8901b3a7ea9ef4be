"""Sums that are scattered, in one go and side by side."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from argenseg_jax import sharding
from argenseg_jax.config import MeshConfig
from argenseg_jax.kernels import collectives
from argenseg_jax.planning import hlo, topology


@pytest.mark.parametrize("sides", [None, (2, 4), (2, 2, 2)])
@pytest.mark.parametrize("dimension", [0, 1])
def test_each_device_keeps_its_part_of_the_sum(sides, dimension):
  mesh = jax.make_mesh(
    (8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  addends = np.random.default_rng(0).normal(size=(8, 16, 24)).astype("float32")
  parts = PartitionSpec(*(None,) * dimension, "fsdp")

  def local(x):
    return collectives.scatter_sum(x[0], "fsdp", dimension, sides=sides)

  scattered = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=PartitionSpec("fsdp"),
      out_specs=parts,
      check_vma=False,
    )
  )(jnp.asarray(addends))
  np.testing.assert_allclose(scattered, addends.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scattered", [False, True])
def test_sums_of_bfloat16_beside_an_axis_that_xla_splits(scattered):
  """A plain `psum` of them ends a CPU's process (jaxlib 0.10.2)."""
  axes = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=axes)
  addends = np.random.default_rng(0).normal(size=(4, 8, 8))
  addends = jnp.asarray(addends, jnp.bfloat16)

  def local(x):
    if scattered:
      return collectives.scatter_sum(x[0], "fsdp", 0)
    return collectives.sum_over(x[0], ("fsdp",))

  total = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=PartitionSpec("fsdp"),
      out_specs=PartitionSpec("fsdp" if scattered else None),
      axis_names={"fsdp"},
      check_vma=False,
    )
  )(addends)
  assert total.dtype == jnp.bfloat16
  exact = np.asarray(addends, np.float32).sum(0)
  np.testing.assert_allclose(np.asarray(total, np.float32), exact, rtol=2**-8)


def test_options_are_for_tpus_and_the_offload_for_sparse_cores():
  assert collectives.compiler_options("cpu") == {}
  assert collectives.compiler_options("NVIDIA H200") == {}
  plain = collectives.compiler_options("TPU v5 lite")
  assert not any("sparse_core" in name for name in plain)
  for kind in ("TPU v5p", "TPU v6 lite", "TPU7x"):
    assert plain.items() < collectives.compiler_options(kind).items()


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:2x4", "v5p:2x2x2"])
def test_no_whole_sum_on_a_described_tpu(name):
  """Without help the first and the last of these all-reduce."""
  described = topology.parse(name)
  topology.prepare(described)
  mesh = sharding.make_mesh(MeshConfig(1, -1, 1), topology.devices(described))
  everywhere = NamedSharding(mesh, PartitionSpec())
  whole = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=everywhere)
  with jax.set_mesh(mesh):
    scatter = jax.shard_map(
      lambda x: collectives.scatter_sum(2 * x, "fsdp", 0),
      mesh=mesh,
      in_specs=PartitionSpec(),
      out_specs=PartitionSpec("fsdp"),
      check_vma=False,
    )
    compiled = (
      jax.jit(scatter, compiler_options=sharding.compiler_options(mesh))
      .lower(whole)
      .compile()
    )
  found = hlo.collectives(compiled.as_text())
  assert {c.kind for c in found} == {"reduce-scatter"}
  assert max(c.size for c in found) == 4096 * 1024 * 2
