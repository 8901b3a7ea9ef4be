"""Adapters: nothing at first, the same merged or not, named and checked."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from argenseg_jax.config import ConfigError, LoRAConfig
from argenseg_jax.models import int8, lora

CONFIG = LoRAConfig(
  rank=3,
  alpha=6.0,
  targets=("llm.layers.attention.*", "llm.layers.mlp.*", "vision.tower.*"),
  train=(),
  base="float32",
)


def llm_outputs(model) -> np.ndarray:
  """Hidden states of a few tokens, and the vision embeddings of an image."""
  graph, state = nnx.split(model)
  return np.asarray(_run(graph, state), np.float32)


@functools.partial(jax.jit, static_argnames="graph")
def _run(graph, state):
  model = nnx.merge(graph, state)
  tokens = jnp.asarray([[12, 13, 14, 15]], jnp.int32)
  vision = model.vision_embeddings(jnp.ones((1, 1, 16, 16, 3)))
  x = jnp.concatenate((model.llm.embed(tokens), vision), 1)
  hidden, _ = model.llm(
    x,
    positions=jnp.arange(x.shape[1])[None],
    segment_ids=jnp.ones((1, x.shape[1]), jnp.int32),
  )
  return hidden


def adapted(weights=None, *, moved=False, config=CONFIG):
  """A model with adapters, of random B where they `moved`."""
  model = tiny_model.model()
  if weights is not None:
    int8.quantize(model.llm, weights)
  lora.adapt(model, config, seed=1)
  if moved:
    for i, (*_, linear) in enumerate(lora.projections(model)):
      if hasattr(linear, "lora_b"):
        key, shape = jax.random.key(i), linear.lora_b.shape
        linear.lora_b[...] = 0.1 * jax.random.normal(key, shape)
  return model


@pytest.mark.parametrize("weights", [None, "int8"])
def test_fresh_adapters_give_the_outputs_of_the_base(weights):
  base = tiny_model.model()
  if weights is not None:
    int8.quantize(base.llm, weights)
  wanted = llm_outputs(base)
  np.testing.assert_array_equal(llm_outputs(adapted(weights)), wanted)
  moved = llm_outputs(adapted(weights, moved=True))
  assert np.abs(moved - wanted).max() > 1e-2


def test_merged_equals_unmerged():
  model = adapted(moved=True)
  wanted = llm_outputs(model)
  names = {path for path, *_ in lora.projections(model)}
  lora.merge(model)
  np.testing.assert_allclose(llm_outputs(model), wanted, atol=1e-5)
  assert {path for path, *_ in lora.projections(model)} == names
  leaves = [leaf for _, leaf in nnx.to_flat_state(nnx.state(model))]
  assert not any(isinstance(leaf, lora.Adapter) for leaf in leaves)
  wanted = jax.tree.map(jnp.shape, nnx.state(tiny_model.model()))
  assert jax.tree.map(jnp.shape, nnx.state(model)) == wanted


def test_each_target_has_an_adapter_and_what_trains_is_chosen():
  config = LoRAConfig(
    rank=2,
    alpha=2.0,
    targets=("llm.layers.attention.query", "llm.layers.mlp.*"),
    train=("vision.connector", "pos_embed"),
    base="float32",
  )
  model = adapted(config=config)
  _, trained, _ = nnx.split(
    model, lora.trainable_filter(config, nnx.state(model)), ...
  )
  flat = nnx.to_flat_state(trained)
  shapes = {".".join(map(str, path)): leaf.shape for path, leaf in flat}
  adapters = {n: s for n, s in shapes.items() if "lora" in n}
  layer = "llm.layers."
  assert adapters == {
    f"{layer}attention.query.lora_a": (2, 16, 2),
    f"{layer}attention.query.lora_b": (2, 2, 16),
    f"{layer}mlp.gate.lora_a": (2, 16, 2),
    f"{layer}mlp.gate.lora_b": (2, 2, 24),
    f"{layer}mlp.up.lora_a": (2, 16, 2),
    f"{layer}mlp.up.lora_b": (2, 2, 24),
    f"{layer}mlp.down.lora_a": (2, 24, 2),
    f"{layer}mlp.down.lora_b": (2, 2, 16),
  }
  assert {n.split(".")[0] for n in shapes.keys() - adapters.keys()} == {
    "vision",
    "pos_embed",
  }
  for _, leaf in flat:
    assert len(leaf.get_metadata("axes")) == leaf.ndim


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(targets=("llm.attn.*",)), "'llm.attn.*', which matches no"),
    (dict(train=("connector",)), "'connector', which is no part"),
  ],
)
def test_patterns_that_match_nothing_are_refused(changes, message):
  config = dataclasses.replace(CONFIG, **changes)

  def use():
    model = adapted(config=config)
    lora.trainable_filter(config, nnx.state(model))

  with pytest.raises(ConfigError, match=re.escape(message)):
    use()


def test_a_fingerprint_sees_values_and_places_only():
  llm = tiny_model.model().llm
  wide = nnx.state(llm)
  name = lora.fingerprint(wide)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
  assert lora.fingerprint(half) == name
  mesh = jax.make_mesh((8,), ("x",))
  spread = jax.device_put(
    wide, jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
  )
  assert lora.fingerprint(spread) == name
  kernel = llm.layers.mlp.up.kernel
  kept = kernel[...]
  for changed in (kept.at[1, 2, 3].mul(1.01), kept[:, ::-1], -kept):
    kernel[...] = changed
    assert lora.fingerprint(nnx.state(llm)) != name
