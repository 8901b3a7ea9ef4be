"""Parity of the decoder alone: logits, cache, rope tables, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.models.llm import Decoder, KVCache
from argenseg_jax.torch_weights import hf_config
from argenseg_jax.torch_weights.parity.compare import (
  Check,
  Golden,
  gradient_checks,
  torch_gradients,
)


def checks(golden: Golden) -> dict[str, Check]:
  """One check for every array that this kind of folder may hold."""
  values = hf_config.group(golden.config, "llm")
  tied = "output.weight" not in golden.weights.tensors
  config = hf_config.llm_config(values, tied_head=tied)
  table = families.table(config)
  graph, state = golden.load(lambda: Decoder(config, rngs=nnx.Rngs(0)), table)

  def ids(name):
    return jnp.asarray(golden[name], jnp.int32)

  def forward(state, tokens, positions, valid, *, rope_length):
    """Logits, and the decoder's hidden states as the recorder lists them."""
    model = nnx.merge(graph, state)
    hidden, inputs = model(
      model.embed(tokens),
      positions=positions,
      segment_ids=valid.astype(jnp.int32),
      rope_length=rope_length,
      collect_layers=True,
    )
    return hidden @ model.head.T, jnp.concatenate((inputs, hidden[None]))

  def run(name, rope_length=None):
    tokens = ids(name)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    f = jax.jit(functools.partial(forward, rope_length=rope_length))
    return f(state, tokens, positions, jnp.ones_like(tokens))

  @functools.cache
  def plain():
    return run("in.input_ids")

  @functools.cache
  def chunked():
    """The ids in chunks, over a cache; logits and the cache at the end."""
    tokens = ids("in.input_ids")
    b, t = tokens.shape
    cache, logits, start = KVCache.empty(config, b, t), [], 0

    @jax.jit
    def extend(state, tokens, cache):
      model = nnx.merge(graph, state)
      steps = cache.length + jnp.arange(tokens.shape[1])
      hidden, cache = model.extend(
        model.embed(tokens),
        cache,
        positions=jnp.broadcast_to(steps, tokens.shape),
        valid=jnp.ones(tokens.shape, bool),
        rope_length=t,
      )
      return hidden @ model.head.T, cache

    for length in golden["in.chunks"]:
      part, cache = extend(state, tokens[:, start : start + int(length)], cache)
      logits.append(part)
      start += int(length)
    return jnp.concatenate(logits, 1), cache

  def left_padded():
    valid = ids("in.leftpad_attention_mask")
    logits, _ = jax.jit(functools.partial(forward, rope_length=None))(
      state,
      ids("in.leftpad_input_ids"),
      ids("in.leftpad_position_ids"),
      valid,
    )
    return jnp.where(valid[:, :, None] > 0, logits, 0.0)

  def frequencies(length):
    return nnx.merge(graph, state).frequencies(length)

  def rope(function):
    t = golden["in.input_ids"].shape[1]
    angles = np.arange(t, dtype=np.float32)[:, None] * frequencies(t)
    return np.tile(function(angles), 2)

  def long_length():
    return golden["in.long_input_ids"].shape[1]

  @jax.value_and_grad
  def loss(state):
    model = nnx.merge(graph, state)
    tokens = ids("in.input_ids")
    labels = ids("in.labels")[:, 1:].reshape(-1)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model(
      model.embed(tokens),
      positions=positions,
      segment_ids=jnp.ones_like(tokens),
    )
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    weights = (labels >= 0).astype(jnp.float32)
    per_token = linear_cross_entropy(hidden, model.head, labels, weights)
    return jnp.sum(per_token) / jnp.sum(weights)

  @functools.cache
  def trained():
    value, gradients = jax.jit(loss)(state)
    return value, torch_gradients(table, gradients)

  def cached(part):
    return lambda: jnp.swapaxes(getattr(chunked()[1], part)[0], 1, 2)

  return {
    "out.logits": Check(lambda: plain()[0]),
    "out.hidden_states": Check(lambda: plain()[1]),
    "out.k_cache_layer0": Check(cached("keys")),
    "out.v_cache_layer0": Check(cached("values")),
    "out.logits_chunked": Check(lambda: chunked()[0]),
    "out.leftpad_logits": Check(left_padded),
    "out.rope_cos": Check(lambda: rope(np.cos)),
    "out.rope_sin": Check(lambda: rope(np.sin)),
    "out.long_logits": Check(lambda: run("in.long_input_ids")[0]),
    "out.long_inv_freq": Check(lambda: frequencies(long_length())),
    "out.stale_logits": Check(lambda: run("in.input_ids", long_length())[0]),
    "out.loss": Check(lambda: trained()[0][None]),
    **gradient_checks(golden, "out.", "out.grad_names", lambda: trained()[1]),
  }
