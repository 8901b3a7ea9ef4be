"""Mesh, the axis table, parameters born sharded, equal results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx
from jax.sharding import PartitionSpec

from argenseg_jax import construct, sharding
from argenseg_jax.config import ConfigError, MeshConfig
from argenseg_jax.config_parsing import replace
from argenseg_jax.models.argenseg import ARGenSeg


def mesh(data, fsdp, tensor):
  return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def test_one_size_may_be_left_open():
  assert dict(mesh(2, -1, 2).shape) == {
    "slice": 1,
    "data": 2,
    "fsdp": 2,
    "tensor": 2,
  }


def test_slices_are_an_axis_of_their_own():
  config = MeshConfig(data=1, fsdp=-1, tensor=2)
  found = sharding.make_mesh(config, slices=2)
  assert tuple(found.devices.shape) == (2, 1, 2, 2)
  with pytest.raises(ConfigError, match="8 devices in 3 slices"):
    sharding.make_mesh(config, slices=3)


@pytest.mark.parametrize(
  "sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, 8, 1)]
)
def test_impossible_mesh_is_one_sentence(sizes):
  with pytest.raises(ConfigError, match=r"mesh \(data=.*\)"):
    mesh(*sizes)


def test_indivisible_dimension_names_parameter_and_mesh():
  config = replace(tiny_model.config(), {"llm.mlp_width": 20})
  state = nnx.state(
    construct.abstract(lambda: ARGenSeg(config, rngs=construct.Rngs(0)).llm)
  )
  with pytest.raises(
    ConfigError, match=r"mlp.*kernel.*'mlp' of 20.*tensor.* 8"
  ):
    sharding.state_shardings(state, mesh(1, 1, 8))


def test_parameters_are_born_sharded_and_equal():
  from argenseg_jax.models.llm import Decoder

  config = replace(tiny_model.config(), {"llm.vocab_size": 32}).llm

  def make():
    return Decoder(config, rngs=construct.Rngs(0))

  whole_graph, whole = sharding.create_sharded(make, mesh(8, 1, 1))
  graph, state = sharding.create_sharded(make, mesh(2, 2, 2))
  kernel = state["layers"]["mlp"]["gate"]["kernel"][...]
  assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
  assert kernel.addressable_shards[0].data.shape == (2, 8, 12)
  tokens = jnp.arange(24).reshape(8, 3)

  def loss(state, graph):
    model = nnx.merge(graph, state)
    hidden, _ = model(
      model.embed(tokens),
      positions=jnp.broadcast_to(jnp.arange(3), (8, 3)),
      segment_ids=jnp.ones((8, 3), jnp.int32),
    )
    return jnp.mean((hidden @ model.head.T) ** 2)

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected, expected_grads = run(whole, whole_graph)
  value, grads = run(state, graph)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    grads,
    expected_grads,
  )


def test_batches_follow_the_state():
  whole = sharding.replicated(mesh(8, 1, 1))
  state = {"w": jax.device_put(jnp.ones(3), whole)}
  batch = {"rows": np.arange(16).reshape(16, 1), "odd": np.arange(3)}
  put = sharding.put_like(batch, state)
  jax.tree.map(np.testing.assert_array_equal, put, batch)
  assert put["rows"].addressable_shards[0].data.shape == (2, 1)
  assert put["odd"].sharding.is_fully_replicated
  lone = {"w": jnp.ones(3)}
  assert sharding.put_like(batch, lone) is batch
