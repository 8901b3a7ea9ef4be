"""The decoder: grouped-query attention, RoPE, RMSNorm, SwiGLU, KV cache.

One module with switches serves InternLM2 (no qkv bias, untied head) and Qwen2
(qkv bias, tied or untied head). Layers are stacked and scanned.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from argenseg_jax import construct
from argenseg_jax.model_config import LLMConfig
from argenseg_jax.models import attention, layers, remat, splash_attention


class KVCache(NamedTuple):
  """Keys and values of a fixed number of slots, filled from slot 0 on.

  All rows share one timeline: a slot in which a row had nothing to say is
  marked invalid for that row.
  """

  keys: Array  # [l b s kv hd], rotated.
  values: Array  # [l b s kv hd]
  valid: Array  # bool [b s]
  length: Array  # int32 []: slots filled so far.

  @classmethod
  def empty(
    cls, config: LLMConfig, batch: int, slots: int, dtype=jnp.float32
  ) -> "KVCache":
    shape = (
      config.num_layers,
      batch,
      slots,
      config.num_kv_heads,
      config.head_dim,
    )
    return cls(
      keys=jnp.zeros(shape, dtype),
      values=jnp.zeros(shape, dtype),
      valid=jnp.zeros((batch, slots), bool),
      length=jnp.zeros((), jnp.int32),
    )

  def starting_with(self, prefix: "KVCache") -> "KVCache":
    """This empty cache with a full one of a single row before all rows."""
    shape = (self.keys.shape[1], prefix.valid.shape[1])
    corner = (0, 0, 0, 0, 0)

    def write(old, new):
      new = jnp.broadcast_to(new, (len(old), *shape, *old.shape[3:]))
      return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), corner)

    return KVCache(
      keys=write(self.keys, prefix.keys),
      values=write(self.values, prefix.values),
      valid=self.valid.at[:, : shape[1]].set(prefix.valid),
      length=prefix.length,
    )


class Attention(nnx.Module):
  """Causal self-attention with grouped queries."""

  def __init__(
    self, config: LLMConfig, *, rngs: construct.Rngs, dtype, param_dtype
  ):
    self.config = config
    d, hd = config.width, config.head_dim
    kwargs: dict[str, Any] = dict(
      rngs=rngs, dtype=dtype, param_dtype=param_dtype
    )
    bias = dict(use_bias=config.qkv_bias)
    heads, kv = config.num_heads * hd, config.num_kv_heads * hd
    self.query = layers.Linear(
      d, heads, axes=("embed", "heads"), **bias, **kwargs
    )
    self.key = layers.Linear(
      d, kv, axes=("embed", "kv_heads"), **bias, **kwargs
    )
    self.value = layers.Linear(
      d, kv, axes=("embed", "kv_heads"), **bias, **kwargs
    )
    self.out = layers.Linear(
      heads, d, axes=("heads", "embed"), use_bias=config.out_bias, **kwargs
    )
    if config.qk_norm:
      norm: dict[str, Any] = dict(
        rngs=rngs, eps=config.norm_eps, param_dtype=param_dtype
      )
      self.query_norm = layers.RMSNorm(hd, **norm)
      self.key_norm = layers.RMSNorm(hd, **norm)
    if config.tie_first_head_init:
      kernel = self.key.kernel[...]
      self.key.kernel[...] = kernel.at[:, :hd].set(
        self.query.kernel[...][:, :hd]
      )

  def project(self, x, positions, frequencies):
    """Returns rotated queries and keys, and values."""
    b, t, _ = x.shape
    hd = self.config.head_dim
    q, k, v = (
      remat.named(linear(x), remat.QKV).reshape(b, t, -1, hd)
      for linear in (self.query, self.key, self.value)
    )
    if self.config.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    q = layers.rotate(q, positions, frequencies)
    k = layers.rotate(k, positions, frequencies)
    return q, k, v


class MLP(nnx.Module):
  """SwiGLU: down(silu(gate x) * up x)."""

  def __init__(
    self, config: LLMConfig, *, rngs: construct.Rngs, dtype, param_dtype
  ):
    d, m = config.width, config.mlp_width
    kwargs: dict[str, Any] = dict(
      rngs=rngs, use_bias=False, dtype=dtype, param_dtype=param_dtype
    )
    self.gate = layers.Linear(d, m, axes=("embed", "mlp"), **kwargs)
    self.up = layers.Linear(d, m, axes=("embed", "mlp"), **kwargs)
    self.down = layers.Linear(m, d, axes=("mlp", "embed"), **kwargs)

  def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    gate, up = (
      remat.named(linear(x), remat.MLP_HIDDEN)
      for linear in (self.gate, self.up)
    )
    return self.down(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
  """Pre-norm attention and MLP."""

  def __init__(
    self, config: LLMConfig, *, rngs: construct.Rngs, dtype, param_dtype
  ):
    kwargs: dict[str, Any] = dict(
      rngs=rngs, dtype=dtype, param_dtype=param_dtype
    )
    norm: dict[str, Any] = dict(
      rngs=rngs, eps=config.norm_eps, param_dtype=param_dtype
    )
    self.attention_norm = layers.RMSNorm(config.width, **norm)
    self.attention = Attention(config, **kwargs)
    self.mlp_norm = layers.RMSNorm(config.width, **norm)
    self.mlp = MLP(config, **kwargs)

  def finish(self, x, attended):
    """Adds the attention's result and the MLP's to the residual stream."""
    b, t = x.shape[:2]
    x = x + self.attention.out(attended.reshape(b, t, -1))
    x = remat.named(x, remat.MLP_INPUT)
    return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
  """Word embedding, layers, final norm and head."""

  def __init__(
    self,
    config: LLMConfig,
    *,
    rngs: construct.Rngs,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
  ):
    self.config = config
    self.dtype = dtype
    table = (config.vocab_size, config.width)
    axes = ("vocab", "embed")
    self.embedding = layers.param(
      rngs,
      table,
      axes,
      nnx.initializers.normal(config.embedding_std),
      param_dtype,
    )
    self.layers: nnx.Pytree = layers.stack(
      lambda rngs: DecoderLayer(
        config, rngs=rngs, dtype=dtype, param_dtype=param_dtype
      ),
      config.num_layers,
      rngs,
    )
    self.norm = layers.RMSNorm(
      config.width, rngs=rngs, eps=config.norm_eps, param_dtype=param_dtype
    )
    self.untied_head = (
      None
      if config.tied_head
      else layers.param(
        rngs,
        table,
        axes,
        nnx.initializers.normal(config.width**-0.5),
        param_dtype,
      )
    )
    # [vocab], where `int8.quantize` made the head's numbers eight-bit.
    self.head_scale: nnx.Variable | None = None

  def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Word embeddings; the row of `pad_id` gets no gradient."""
    x = jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)
    if self.head_scale is not None and self.untied_head is None:
      x = x * jnp.take(self.head_scale[...], tokens)[..., None].astype(x.dtype)
    if self.config.pad_id is None:
      return x
    is_pad = (tokens == self.config.pad_id)[:, :, None]
    return jnp.where(is_pad, jax.lax.stop_gradient(x), x)

  @property
  def head(self) -> Float[Array, "vocab d"]:
    """The output matrix, for words and codes alike."""
    return self.head_rows()

  def head_rows(
    self, first: int = 0, count: int | None = None
  ) -> Float[Array, "rows d"]:
    """Some rows of the output matrix."""
    chosen = slice(first, None if count is None else first + count)
    rows = self._head_numbers()[chosen]
    if self.head_scale is None:
      return rows
    scaled = rows.astype(jnp.float32) * self.head_scale[...][chosen, None]
    return scaled.astype(self.dtype)

  def logits(self, hidden: Float[Array, "b d"]) -> Float[Array, "b vocab"]:
    """Logits of all words and codes, float32."""
    logits = jnp.einsum(
      "bd,vd->bv",
      hidden,
      self._head_numbers().astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits if self.head_scale is None else logits * self.head_scale[...]

  def _head_numbers(self):
    if self.untied_head is None:
      return self.embedding[...]
    return self.untied_head[...]

  def frequencies(self, rope_length: int = 0):
    """RoPE's inverse frequencies for a table that served `rope_length`."""
    c = self.config
    return layers.rope_frequencies(
      int(c.head_dim * c.rope_fraction),
      c.rope_theta,
      scaling=c.rope_scaling,
      factor=c.rope_factor,
      max_positions=c.max_positions,
      length=rope_length,
    )

  @jax.named_scope("decoder")
  def __call__(
    self,
    x: Float[Array, "b t d"],
    *,
    positions: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    reach: Int[Array, "b t"] | None = None,
    rope_length: int | None = None,
    remat_policy: Callable | bool | None = False,
    collect_layers: bool = False,
  ) -> tuple[Float[Array, "b t d"], Float[Array, "l b t d"] | None]:
    """Full forward pass over embedded tokens.

    Args:
      x: input embeddings.
      positions: RoPE positions.
      segment_ids: which sample a position belongs to; 0 is padding.
      reach: see `attention.attention_mask`; None is plain causal attention.
      rope_length: longest sequence that the rope table has served (dynamic
        NTK); None takes t.
      remat_policy: see `layers.layer_scan`.
      collect_layers: also return every layer's input.

    Returns:
      Hidden states after the final norm, and the layers' inputs or None.
    """
    b, t, _ = x.shape
    frequencies = self.frequencies(t if rope_length is None else rope_length)
    if reach is None and splash_attention.available(t):
      attend = functools.partial(
        splash_attention.attend, segment_ids=segment_ids
      )
    else:
      if reach is None:
        reach = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
      visible = attention.Visible(reach, segment_ids, segment_ids)
      attend = attention.attender(
        visible, rows=b, heads=self.config.num_heads, queries=t, keys=t
      )

    def step(layer, x, _):
      q, k, v = layer.attention.project(
        layer.attention_norm(x), positions, frequencies
      )
      y = layer.finish(x, attend(q, k, v))
      return y, (x if collect_layers else None)

    x, inputs = layers.layer_scan(
      self.layers, step, x.astype(self.dtype), remat_policy=remat_policy
    )
    return self.norm(x), inputs

  def extend(
    self,
    x: Float[Array, "b t d"],
    cache: KVCache,
    *,
    positions: Int[Array, "b t"],
    valid: Bool[Array, "b t"],
    reach: Int[Array, "b t"] | None = None,
    visible_slots: int | None = None,
    rope_length: int = 0,
  ) -> tuple[Float[Array, "b t d"], KVCache]:
    """Runs t more positions over the cache; prefill and decoding alike.

    Args:
      x: input embeddings.
      cache: has room for t more slots (slots past its end are overwritten).
      positions: RoPE positions.
      valid: False where a row has nothing to say; such slots are never seen.
      reach: last visible index *within this call*; None is causal.
      visible_slots: no slot from here on is filled after this call, so that
        attention need not read it; None knows nothing.
      rope_length: see `__call__`.

    Returns:
      Hidden states after the final norm, and the longer cache.
    """
    b, t, _ = x.shape
    start = cache.length
    if reach is None:
      reach = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    slots_valid = jax.lax.dynamic_update_slice(cache.valid, valid, (0, start))
    visible = attention.Visible(
      start + reach,
      jnp.ones((b, t), jnp.int32),
      slots_valid[:, :visible_slots].astype(jnp.int32),
    )
    num_seen = visible.key_segments.shape[1]
    attend = attention.attender(
      visible, rows=b, heads=self.config.num_heads, queries=t, keys=num_seen
    )
    frequencies = self.frequencies(rope_length)
    seen_shape = (b, num_seen, *cache.keys.shape[3:])

    def step(layer, carry, index):
      x, keys, values = carry
      q, k, v = layer.attention.project(
        layer.attention_norm(x), positions, frequencies
      )
      corner = (index, 0, start, 0, 0)
      keys = jax.lax.dynamic_update_slice(
        keys, k[None].astype(keys.dtype), corner
      )
      values = jax.lax.dynamic_update_slice(
        values, v[None].astype(values.dtype), corner
      )
      all_k, all_v = (
        jax.lax.dynamic_slice(x, (index, 0, 0, 0, 0), (1, *seen_shape))[0]
        for x in (keys, values)
      )
      attended = attend(q, all_k.astype(q.dtype), all_v.astype(q.dtype))
      return (layer.finish(x, attended), keys, values), None

    (x, keys, values), _ = layers.layer_scan(
      self.layers,
      step,
      (x.astype(self.dtype), cache.keys, cache.values),
      np.arange(self.config.num_layers),
    )
    return self.norm(x), KVCache(keys, values, slots_valid, start + t)
