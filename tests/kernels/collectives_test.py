"""Sums that are scattered, in one go and side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from argenseg_jax.kernels import collectives


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


def test_only_chips_with_sparse_cores_get_options():
  assert collectives.compiler_options("cpu") == {}
  assert collectives.compiler_options("TPU v5 lite") == {}
  assert all(collectives.compiler_options("TPU v5p").values())
