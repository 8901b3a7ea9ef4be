"""Parity of the decoder alone: logits, cache, rope tables, gradients."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.model_config import LLMConfig
from argenseg_jax.models.llm import Decoder, KVCache
from argenseg_jax.torch_weights import families, hf_config
from argenseg_jax.torch_weights.parity.compare import (
  Check,
  Golden,
  gradient_checks,
  torch_gradients,
)
from argenseg_jax.torch_weights.tables import Table


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
  """What this code makes of a folder's inputs; each program runs once."""

  golden: Golden
  config: LLMConfig
  table: Table
  graph: nnx.GraphDef
  state: nnx.State

  def ids(self, name: str) -> jax.Array:
    return jnp.asarray(self.golden[name], jnp.int32)

  def _forward(self, state, tokens, positions, valid, *, rope_length):
    model = nnx.merge(self.graph, state)
    hidden, inputs = model(
      model.embed(tokens),
      positions=positions,
      segment_ids=valid.astype(jnp.int32),
      rope_length=rope_length,
      collect_layers=True,
    )
    return hidden @ model.head.T, jnp.concatenate((inputs, hidden[None]))

  def run(self, name: str, rope_length: int | None = None):
    """Logits, and the decoder's hidden states as the recorder lists them."""
    tokens = self.ids(name)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(functools.partial(self._forward, rope_length=rope_length))
    return run(self.state, tokens, positions, jnp.ones_like(tokens))

  @functools.cached_property
  def plain(self):
    return self.run("in.input_ids")

  @functools.cached_property
  def chunked(self) -> tuple[jax.Array, KVCache]:
    """The ids in chunks, over a cache; logits and the cache at the end."""
    tokens = self.ids("in.input_ids")
    b, t = tokens.shape
    cache, logits, start = KVCache.empty(self.config, b, t), [], 0

    @jax.jit
    def extend(state, tokens, cache):
      model = nnx.merge(self.graph, state)
      steps = cache.length + jnp.arange(tokens.shape[1])
      hidden, cache = model.extend(
        model.embed(tokens),
        cache,
        positions=jnp.broadcast_to(steps, tokens.shape),
        valid=jnp.ones(tokens.shape, bool),
        rope_length=t,
      )
      return hidden @ model.head.T, cache

    for length in self.golden["in.chunks"]:
      chunk = tokens[:, start : start + int(length)]
      part, cache = extend(self.state, chunk, cache)
      logits.append(part)
      start += int(length)
    return jnp.concatenate(logits, 1), cache

  def cached(self, part: str) -> jax.Array:
    """Keys or values of the first layer, in PyTorch's order of axes."""
    return jnp.swapaxes(getattr(self.chunked[1], part)[0], 1, 2)

  @property
  def left_padded(self) -> jax.Array:
    valid = self.ids("in.leftpad_attention_mask")
    logits, _ = jax.jit(functools.partial(self._forward, rope_length=None))(
      self.state,
      self.ids("in.leftpad_input_ids"),
      self.ids("in.leftpad_position_ids"),
      valid,
    )
    return jnp.where(valid[:, :, None] > 0, logits, 0.0)

  def frequencies(self, length: int) -> jax.Array:
    return nnx.merge(self.graph, self.state).frequencies(length)

  def rope(self, function: Callable) -> np.ndarray:
    t = self.golden["in.input_ids"].shape[1]
    angles = np.arange(t, dtype=np.float32)[:, None] * self.frequencies(t)
    return np.tile(function(angles), 2)

  @property
  def long_length(self) -> int:
    return self.golden["in.long_input_ids"].shape[1]

  @functools.cached_property
  def trained(self):
    """The loss, and gradients by PyTorch name."""

    @jax.jit
    @jax.value_and_grad
    def loss(state):
      model = nnx.merge(self.graph, state)
      tokens = self.ids("in.input_ids")
      labels = self.ids("in.labels")[:, 1:].reshape(-1)
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

    value, gradients = loss(self.state)
    return value, torch_gradients(self.table, gradients)


def checks(golden: Golden) -> dict[str, Check]:
  """One check for every array that this kind of folder may hold."""
  values = hf_config.group(golden.config, "llm")
  tied = "output.weight" not in golden.weights.tensors
  config = hf_config.llm_config(values, tied_head=tied)
  table = families.table(config)
  graph, state = golden.load(
    lambda: Decoder(config, rngs=construct.Rngs(0)), table
  )
  ours = Computed(golden, config, table, graph, state)
  return {
    "out.logits": Check(lambda: ours.plain[0]),
    "out.hidden_states": Check(lambda: ours.plain[1]),
    "out.k_cache_layer0": Check(lambda: ours.cached("keys")),
    "out.v_cache_layer0": Check(lambda: ours.cached("values")),
    "out.logits_chunked": Check(lambda: ours.chunked[0]),
    "out.leftpad_logits": Check(lambda: ours.left_padded),
    "out.rope_cos": Check(lambda: ours.rope(np.cos)),
    "out.rope_sin": Check(lambda: ours.rope(np.sin)),
    "out.long_logits": Check(lambda: ours.run("in.long_input_ids")[0]),
    "out.long_inv_freq": Check(lambda: ours.frequencies(ours.long_length)),
    "out.stale_logits": Check(
      lambda: ours.run("in.input_ids", ours.long_length)[0]
    ),
    "out.loss": Check(lambda: ours.trained[0][None]),
    **gradient_checks(
      golden, "out.", "out.grad_names", lambda: ours.trained[1]
    ),
  }
