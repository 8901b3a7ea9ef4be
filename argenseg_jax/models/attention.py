"""Softmax attention with grouped queries, and what each query sees.

Three programs give the same numbers. `attend` has the scores of all queries in
memory at once. `attend_in_tiles` has those of some queries and keys at a time,
and computes them again for the gradient, as FlashAttention does (arXiv
2205.14135): on a CPU a tile stays in the cache, and tiles that no query sees
are left out. GPUs have `attend_by_library`, TPUs `splash_attention`.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from argenseg_jax.kernels import dispatch
from argenseg_jax.kernels.products import even_blocks
from argenseg_jax.models import remat

# Of all rows and heads; cuDNN won from there on (docs/benchmarks.md).
MIN_LIBRARY_SCORES = 2**24
_MIN_SCORES = 2**22  # Of all rows and heads; fewer stay in the cache anyway.
_TILE = 2**20  # Scores of all rows and heads: 4 MiB.
_SIDES = 64, 256  # Fewest and most queries or keys of a tile.
# Where no tile is left out, larger ones are quicker: more work for each thread.
_UNMASKED_SIDE = 520


class Visible(NamedTuple):
  """What each query sees, see `attention_mask`."""

  reach: Int[Array, "b t"]
  query_segments: Int[Array, "b t"]
  key_segments: Int[Array, "b s"]


# A logit that no other reaches; finite, so that a query without keys is too.
_UNSEEN = -1e30


def attend(
  queries: Float[Array, "b t heads hd"],
  keys: Float[Array, "b s kv hd"],
  values: Float[Array, "b s kv hd"],
  mask: Bool[Array, "b t s"] | None = None,
) -> Float[Array, "b t heads hd"]:
  """Softmax attention with grouped queries; softmax in float32.

  A query that sees no key gets the mean of all values: finite, and to be
  ignored by the caller.
  """
  b, t, heads, hd = queries.shape
  groups = (b, t, keys.shape[2], -1, hd)
  queries = (queries * hd**-0.5).astype(queries.dtype).reshape(groups)
  logits = jnp.einsum(
    "btkgd,bskd->bktgs", queries, keys, preferred_element_type=jnp.float32
  )
  if mask is not None:
    # Added, not selected: the backward pass has nothing to mask again.
    logits += jnp.where(mask, 0.0, _UNSEEN)[:, None, :, None]
  peak = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
  weights = jnp.exp(logits - peak)
  # Divided after the product with the values: a row of hd numbers instead of s.
  total = jnp.sum(weights, -1)
  mixed = jnp.einsum(
    "bktgs,bskd->bktgd",
    weights.astype(values.dtype),
    values,
    preferred_element_type=jnp.float32,
  )
  mixed = (mixed / total[..., None]).astype(values.dtype)
  return jnp.moveaxis(mixed, 2, 1).reshape(b, t, heads, hd)


def attention_mask(
  reach: Int[Array, "b t"],
  query_segments: Int[Array, "b t"],
  key_segments: Int[Array, "b s"],
) -> Bool[Array, "b t s"]:
  """The one place that draws attention masks.

  A query sees the keys of its own segment up to index `reach`. Plain causal
  attention reaches its own index; a query inside a fully connected block (a
  bidirectional prompt, the codes of one scale) reaches the block's end:

      index  0 1 2 3 4     causal      block {1, 2, 3}
      reach  0 1 2 3 4     x . . . .     reach  0 3 3 3 4
                           x x . . .     x . . . .
                           x x x . .     x x x x .
                           x x x x .     x x x x .
                           x x x x x     x x x x .
                                         x x x x x

  Args:
    reach: index of the last visible key of each query.
    query_segments: sample of each query; 0 is padding.
    key_segments: sample of each key; 0 is padding or an empty cache slot.
  """
  index = jnp.arange(key_segments.shape[1])
  visible = index[None, None] <= reach[:, :, None]
  same = query_segments[:, :, None] == key_segments[:, None]
  return visible & same & (key_segments > 0)[:, None]


def attender(
  visible: Visible | None, *, rows: int, heads: int, queries: int, keys: int
) -> Callable:
  """The program to take: a function of queries, keys and values.

  Args:
    visible: what is seen; None is everything.
    rows, heads, queries, keys: how many there are.
  """
  if _library_takes(rows * heads * queries * keys):
    return functools.partial(attend_by_library, visible=visible)
  on_cpu = dispatch.target().platform == "cpu" and not dispatch.partitioned()
  if on_cpu and rows * heads * queries * keys >= _MIN_SCORES:
    return functools.partial(attend_in_tiles, visible=visible)
  mask = None if visible is None else attention_mask(*visible)
  return functools.partial(attend, mask=mask)


def _library_takes(scores: int) -> bool:
  on_gpu = dispatch.target().platform == "gpu" and not dispatch.partitioned()
  return on_gpu and scores >= MIN_LIBRARY_SCORES


def attend_by_library(
  queries: Float[Array, "b t heads hd"],
  keys: Float[Array, "b s kv hd"],
  values: Float[Array, "b s kv hd"],
  visible: Visible | None = None,
) -> Float[Array, "b t heads hd"]:
  """`attend` by cuDNN, which keeps no scores; the plain form where it refuses.

  It takes even lengths only, so odd ones are padded.
  """
  t, s = queries.shape[1], keys.shape[1]
  mask = None if visible is None else attention_mask(*visible)
  even_q = _padded(queries, t + t % 2)
  even_k, even_v = (_padded(x, s + s % 2) for x in (keys, values))
  options = {}
  if mask is not None:
    width = ((0, 0), (0, t % 2), (0, s % 2))
    options["mask"] = jnp.pad(mask, width)[:, None]
  elif s % 2:
    options["key_value_seq_lengths"] = jnp.full(len(keys), s, jnp.int32)
  try:
    out = jax.nn.dot_product_attention(
      even_q, even_k, even_v, implementation="cudnn", **options
    )
  except (NotImplementedError, RuntimeError, ValueError) as error:
    _say_once(f"attention keeps all scores in memory: cuDNN refuses, {error}")
    return attend(queries, keys, values, mask)
  return out[:, :t]


@functools.cache
def _say_once(text: str) -> None:
  logging.getLogger(__name__).warning(text)


def attend_in_tiles(
  queries: Float[Array, "b t heads hd"],
  keys: Float[Array, "b s kv hd"],
  values: Float[Array, "b s kv hd"],
  visible: Visible | None = None,
  *,
  side: int | None = None,
) -> Float[Array, "b t heads hd"]:
  """`attend` with scores of `side` queries and keys at a time.

  A query that sees no key gets the mean of some values.
  """
  b, t, heads, _ = queries.shape
  if side is None and visible is None:
    side = _UNMASKED_SIDE
  elif side is None:
    least, most = _SIDES
    side = max(least, min(most, int((_TILE / (b * heads)) ** 0.5)))
  tiles = _Tiles(b, t, keys.shape[1], keys.shape[2], heads, side)
  return _tiled(tiles, queries, keys, values, visible)


class _Tiles(NamedTuple):
  """How queries and keys are cut; rows and key-value heads become one axis."""

  rows: int
  num_queries: int
  num_keys: int
  kv: int
  heads: int
  side: int

  def of_queries(self, x):
    """[b t heads hd] to [tiles, b kv, queries-per-key q, hd]."""
    count, size = even_blocks(self.num_queries, self.side)
    x = _padded(x, count * size)
    shape = (self.rows, count, size, self.kv, self.heads // self.kv, -1)
    x = jnp.moveaxis(x.reshape(shape), (1, 3, 4), (0, 2, 3))
    return x.reshape(count, self.rows * self.kv, -1, x.shape[-1])

  def to_queries(self, x):
    count, size = even_blocks(self.num_queries, self.side)
    x = x.reshape(count, self.rows, self.kv, -1, size, x.shape[-1])
    x = jnp.moveaxis(x, (0, 2, 3), (1, 3, 4))
    x = x.reshape(self.rows, count * size, self.heads, -1)
    return x[:, : self.num_queries]

  def of_keys(self, x):
    """[b s kv hd] to [tiles, b kv, k, hd]."""
    count, size = even_blocks(self.num_keys, self.side)
    x = _padded(x, count * size)
    x = x.reshape(self.rows, count, size, self.kv, -1)
    x = jnp.moveaxis(x, (1, 3), (0, 2))
    return x.reshape(count, self.rows * self.kv, size, -1)

  def to_keys(self, x):
    x = x.reshape(x.shape[0], self.rows, self.kv, x.shape[2], -1)
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(self.rows, -1, *x.shape[3:])[:, : self.num_keys]

  def of_numbers(self, x, length: int, fill: int):
    """[b n] to [tiles, b, side]."""
    count, size = even_blocks(length, self.side)
    x = _padded(x, count * size, fill)
    return jnp.moveaxis(x.reshape(self.rows, count, size), 1, 0)


class _Seen(NamedTuple):
  """`Visible` in tiles, and how many tiles of keys each tile of queries sees;
  `visible` is None where that is every key."""

  visible: Visible | None
  stop: Int[Array, "tiles"]


def _seen(tiles: _Tiles, visible: Visible | None) -> _Seen:
  count, size = even_blocks(tiles.num_keys, tiles.side)
  if visible is None:
    if count * size == tiles.num_keys:
      num_tiles, _ = even_blocks(tiles.num_queries, tiles.side)
      return _Seen(None, jnp.full(num_tiles, count))
    queries = jnp.ones((tiles.rows, tiles.num_queries), jnp.int32)
    keys = jnp.ones((tiles.rows, tiles.num_keys), jnp.int32)
    visible = Visible(queries * (tiles.num_keys - 1), queries, keys)
  reach = tiles.of_numbers(visible.reach, tiles.num_queries, -1)
  stop = jnp.clip(jnp.max(reach, (1, 2)) // size + 1, 1, count)
  segments = tiles.of_numbers(visible.query_segments, tiles.num_queries, 0)
  of_keys = tiles.of_numbers(visible.key_segments, tiles.num_keys, 0)
  return _Seen(Visible(reach, segments, of_keys), stop)


def _scores(tiles, seen, queries, keys, i, j):
  """Those of tile i of the queries and tile j of the keys, [b kv, q, k]."""
  scores = _product(queries[i], keys[j], 2, 2)
  if seen.visible is None:
    return scores
  reach, query_segments, key_segments = seen.visible
  mask = attention_mask(
    reach[i] - j * keys.shape[2], query_segments[i], key_segments[j]
  )
  groups = tiles.heads // tiles.kv
  bias = jnp.where(mask, 0.0, _UNSEEN)[:, None, None]
  shape = (tiles.rows, tiles.kv, groups, *mask.shape[1:])
  return scores + jnp.broadcast_to(bias, shape).reshape(scores.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(tiles, queries, keys, values, visible):
  return _forward(tiles, queries, keys, values, visible)[0]


def _forward(tiles, queries, keys, values, visible):
  q, k, v = _cut(tiles, queries, keys, values)
  seen = _seen(tiles, visible)

  def of_queries(i):
    def of_keys(j, state):
      peak, total, mixed = state
      scores = _scores(tiles, seen, q, k, i, j)
      new_peak = jnp.maximum(peak, jnp.max(scores, -1))
      weights = jnp.exp(scores - new_peak[..., None])
      shrink = jnp.exp(peak - new_peak)
      total = total * shrink + jnp.sum(weights, -1)
      mixed *= shrink[..., None]
      return new_peak, total, mixed + _product(weights, v[j], 2, 1)

    zeros = jnp.zeros(q.shape[1:3], jnp.float32)
    state = zeros + _UNSEEN, zeros, jnp.zeros(q.shape[1:], jnp.float32)
    peak, total, mixed = lax.fori_loop(0, seen.stop[i], of_keys, state)
    return mixed / total[..., None], peak + jnp.log(total)

  mixed, normalizers = lax.map(of_queries, jnp.arange(q.shape[0]))
  mixed = tiles.to_queries(mixed).astype(values.dtype)
  # So named, a remat policy can keep what would else run this again.
  mixed, normalizers = (
    remat.named(x, remat.ATTENTION) for x in (mixed, normalizers)
  )
  return mixed, (queries, keys, values, visible, mixed, normalizers)


def _backward(tiles, kept, d_mixed):
  queries, keys, values, visible, mixed, normalizers = kept
  q, k, v = _cut(tiles, queries, keys, values)
  seen = _seen(tiles, visible)
  d = tiles.of_queries(d_mixed)
  # What the softmax takes off each score's gradient.
  shared = d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32)
  shared = tiles.of_queries(jnp.sum(shared, -1, keepdims=True))

  def of_queries(state, i):
    def of_keys(j, state):
      d_q, d_k, d_v = state
      weights = jnp.exp(
        _scores(tiles, seen, q, k, i, j) - normalizers[i][..., None]
      )
      d_scores = _product(d[i], v[j], 2, 2) - shared[i]
      d_scores *= weights
      return (
        d_q + _product(d_scores, k[j], 2, 1),
        d_k.at[j].add(_product(d_scores, q[i], 1, 1)),
        d_v.at[j].add(_product(weights, d[i], 1, 1)),
      )

    d_q = jnp.zeros(q.shape[1:], jnp.float32)
    d_q, *state = lax.fori_loop(0, seen.stop[i], of_keys, (d_q, *state))
    return tuple(state), d_q

  zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  (d_k, d_v), d_q = lax.scan(of_queries, zeros, jnp.arange(q.shape[0]))
  d_q = tiles.to_queries(d_q) * queries.shape[-1] ** -0.5
  return (
    d_q.astype(queries.dtype),
    tiles.to_keys(d_k).astype(keys.dtype),
    tiles.to_keys(d_v).astype(values.dtype),
    None,
  )


_tiled.defvjp(_forward, _backward)


def _cut(tiles, queries, keys, values):
  scaled = (queries * queries.shape[-1] ** -0.5).astype(queries.dtype)
  return tiles.of_queries(scaled), tiles.of_keys(keys), tiles.of_keys(values)


def _product(a, b, contract_a: int, contract_b: int):
  """Of matrices [n ...], float32; a weight takes its value's dtype."""
  return lax.dot_general(
    a.astype(b.dtype),
    b,
    (((contract_a,), (contract_b,)), ((0,), (0,))),
    preferred_element_type=jnp.float32,
  )


def _padded(x, length: int, fill: int = 0):
  rest = [(0, 0)] * (x.ndim - 2)
  widths = [(0, 0), (0, length - x.shape[1]), *rest]
  return jnp.pad(x, widths, constant_values=fill)
