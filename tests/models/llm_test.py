"""Properties of the decoder: causality, cache, segments, rope."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.model_config import LLMConfig
from argenseg_jax.models import layers, remat
from argenseg_jax.models.attention import attention_mask
from argenseg_jax.models.llm import Decoder, KVCache

FAMILIES = {
  "internlm2": dict(rope_scaling="dynamic", rope_factor=2.0, pad_id=2),
  "qwen2": dict(qkv_bias=True),
  "tied": dict(qkv_bias=True, tied_head=True),
  "small": dict(qk_norm=True, rope_fraction=0.5, tie_first_head_init=True),
}


@functools.cache
def make(**changes) -> Decoder:
  config = LLMConfig(
    vocab_size=31,
    width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=40,
    max_positions=64,
    **changes,
  )
  build = jax.jit(lambda: nnx.split(Decoder(config, rngs=construct.Rngs(0))))
  return nnx.merge(*build())


@functools.partial(jax.jit, static_argnames=("graph", "remat_policy"))
def _run(graph, state, x, remat_policy=False, **kwargs):
  model = nnx.merge(graph, state)
  return model(x, remat_policy=remat_policy, **kwargs)[0]


def run(model, x, **kwargs):
  """Jitted forward pass of embedded tokens; plain causal by default."""
  b, t, _ = x.shape
  defaults = dict(
    positions=jnp.broadcast_to(jnp.arange(t), (b, t)),
    segment_ids=jnp.ones((b, t), jnp.int32),
  )
  return _run(*nnx.split(model), x, **(defaults | kwargs))


@functools.partial(jax.jit, static_argnames="graph")
def _extend(graph, state, x, cache, **kwargs):
  return nnx.merge(graph, state).extend(x, cache, **kwargs)


def forward(model, tokens, **kwargs):
  return run(model, model.embed(tokens), **kwargs)


def visible_from(model, tokens, **kwargs):
  """bool [t t] of row 0: which inputs move which output, by gradient."""
  probe = jnp.arange(1.0, 1.0 + model.config.width)

  def outputs(x):
    return jnp.sin(run(model, x, **kwargs)[0]) @ probe

  jacobian = jax.jacrev(outputs)(model.embed(tokens))
  assert not jnp.any(jacobian[:, 1:])
  return np.asarray(jnp.any(jacobian[:, 0] != 0, axis=-1))


@pytest.fixture
def tokens():
  return jnp.asarray(np.random.default_rng(0).integers(3, 31, (2, 12)))


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_by_gradient(family, tokens):
  visible = visible_from(make(**FAMILIES[family]), tokens)
  np.testing.assert_array_equal(visible, np.tri(12, dtype=bool))


def test_reach_opens_a_block_by_gradient(tokens):
  reach = np.arange(12)
  reach[3:7] = 6
  visible = visible_from(
    make(), tokens, reach=jnp.broadcast_to(reach, tokens.shape)
  )
  np.testing.assert_array_equal(visible, np.arange(12) <= reach[:, None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [(12,), (5, 1, 6), (1,) * 12])
def test_cached_chunks_equal_full_forward(family, chunks, tokens):
  model = make(**FAMILIES[family])
  full = forward(model, tokens)
  cache = KVCache.empty(model.config, 2, 16)
  parts, start = [], 0
  for n in chunks:
    places = jnp.broadcast_to(jnp.arange(start, start + n), (2, n))
    hidden, cache = _extend(
      *nnx.split(model),
      model.embed(tokens[:, start : start + n]),
      cache,
      positions=places,
      valid=jnp.ones((2, n), bool),
    )
    parts.append(hidden)
    start += n
  np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=2e-5)
  assert int(cache.length) == 12


def test_invalid_slots_are_never_seen(tokens):
  model = make()
  cache = KVCache.empty(model.config, 2, 20)
  x = model.embed(tokens)
  valid = np.ones((2, 12), bool)
  valid[1, 4:9] = False
  places = np.maximum(np.cumsum(valid, 1) - 1, 0)
  hidden, _ = _extend(
    *nnx.split(model),
    x,
    cache,
    positions=jnp.asarray(places),
    valid=jnp.asarray(valid),
  )
  kept = forward(model, tokens[1:, valid[1]])
  np.testing.assert_allclose(hidden[1, valid[1]], kept[0], atol=2e-5)


def test_left_padding_changes_nothing(tokens):
  model = make()
  full = forward(model, tokens)
  pad = 3
  padded = jnp.pad(tokens, ((0, 0), (pad, 0)))
  hidden = forward(
    model,
    padded,
    positions=jnp.maximum(jnp.arange(15) - pad, 0)[None].repeat(2, 0),
    segment_ids=(jnp.arange(15) >= pad).astype(jnp.int32)[None].repeat(2, 0),
  )
  np.testing.assert_allclose(hidden[:, pad:], full, atol=2e-5)


def test_packed_samples_do_not_see_each_other(tokens):
  model = make()
  packed = tokens.reshape(1, -1)
  hidden = forward(
    model,
    packed,
    positions=jnp.tile(jnp.arange(12), 2)[None],
    segment_ids=jnp.repeat(jnp.array([1, 2]), 12)[None],
  )
  np.testing.assert_allclose(
    hidden.reshape(2, 12, -1), forward(model, tokens), atol=2e-5
  )


def test_remat_changes_no_gradient(tokens):
  model = make()
  graph, state = nnx.split(model)

  def loss(state, policy):
    model = nnx.merge(graph, state)
    return jnp.sum(forward(model, tokens, remat_policy=policy) ** 2)

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  plain = gradient(state, False)
  for name, policy in remat.POLICIES.items():
    if name == "none":
      continue
    again = gradient(state, policy.policy)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      plain,
      again,
    )


def test_pad_row_gets_no_gradient():
  model = make(pad_id=2)
  tokens = jnp.array([[5, 2, 7, 2]])
  graph, state = nnx.split(model)

  def loss(state):
    return jnp.sum(forward(nnx.merge(graph, state), tokens) ** 2)

  grad = jax.grad(loss)(state)["embedding"][...]
  assert not jnp.any(grad[2])
  assert jnp.any(grad[5])


def test_tied_head_is_the_embedding():
  model = make(tied_head=True)
  np.testing.assert_array_equal(model.head, model.embedding[...])
  assert model.untied_head is None


def test_attention_mask_of_the_docstring():
  reach = jnp.array([[0, 3, 3, 3, 4]])
  one = jnp.ones((1, 5), jnp.int32)
  expected = [
    [1, 0, 0, 0, 0],
    [1, 1, 1, 1, 0],
    [1, 1, 1, 1, 0],
    [1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1],
  ]
  np.testing.assert_array_equal(attention_mask(reach, one, one)[0], expected)


def test_dynamic_rope_changes_nothing_until_the_limit():
  args = dict(scaling="dynamic", factor=2.0, max_positions=64)
  plain = layers.rope_frequencies(8, 1e4)
  at_limit = layers.rope_frequencies(8, 1e4, length=64, **args)
  beyond = layers.rope_frequencies(8, 1e4, length=128, **args)
  np.testing.assert_array_equal(at_limit, plain)
  base = 1e4 * 3 ** (8 / 6)
  np.testing.assert_allclose(
    beyond, base ** -(np.arange(0, 8, 2) / 8), rtol=1e-6
  )


def test_first_head_attends_to_what_looks_alike():
  model = make(tie_first_head_init=True)
  attention = model.layers.attention
  np.testing.assert_array_equal(
    attention.query.kernel[...][:, :, :8], attention.key.kernel[...][:, :, :8]
  )
