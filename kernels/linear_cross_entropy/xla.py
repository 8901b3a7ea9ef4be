"""Blocks of tokens and words in plain XLA: any backend, no logits in memory.

For the gradient, logits are computed again: four products instead of three. On
a CPU that is a third more time, which a small loss need not pay: where all of
its probabilities take 16 MiB at most, they are kept (`keeps_chances`), and only
the second matrix of that size, the gradient of the logits, is spared.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from argenseg_jax.kernels import dispatch
from argenseg_jax.kernels.products import block_elements, even_blocks, product

_WORDS = 8192  # Words of a block; a smaller vocabulary is one block.
_MIN_TOKENS = 128
_MAX_KEPT = 2**22  # Probabilities.


def statistics(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  bears: Bool[Array, "t"] | None = None,
) -> tuple[Float[Array, "t"], Float[Array, "t"]]:
  """Log-sum-exp of the logits and the target's logit, float32.

  A target outside the vocabulary has logit 0. Tokens that do not bear loss cost
  nothing, but for some in the last block; their numbers are finite.
  """
  num_blocks, _ = _word_blocks(head)
  tokens = _Tokens.of(head, targets, bears)
  hidden, targets = tokens.split(hidden), tokens.split(targets)

  def tokens_block(hidden, targets):
    def words_block(i, state):
      peak, total, target_logits = state
      rows, ids, fresh = _words(head, i)
      logits = product(hidden, rows, contract=(1, 1))
      logits = _where(fresh, logits, -jnp.inf)
      new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
      total = total * jnp.exp(peak - new_peak)
      total += jnp.sum(jnp.exp(logits - new_peak[:, None]), axis=1)
      hits = jnp.where(ids == targets[:, None], logits, 0.0)
      target_logits += jnp.sum(_where(fresh, hits, 0.0), axis=1)
      return new_peak, total, target_logits

    zeros = jnp.zeros(hidden.shape[0], jnp.float32)
    state = (jnp.full_like(zeros, -jnp.inf), zeros, zeros)
    state = lax.fori_loop(0, num_blocks, words_block, state)
    peak, total, target_logits = state
    return peak + jnp.log(total), target_logits

  found = tokens.map(tokens_block, hidden, targets)
  return tuple(map(tokens.join, found))


def keeps_chances(
  hidden: Float[Array, "t d"], head: Float[Array, "vocab d"]
) -> bool:
  """Whether probabilities are few enough to keep, and worth it."""
  on_cpu = dispatch.target().platform == "cpu"
  one_block = _word_blocks(head)[0] == 1
  return on_cpu and one_block and hidden.shape[0] * head.shape[0] <= _MAX_KEPT


def statistics_and_chances(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  bears: Bool[Array, "t"] | None = None,
) -> tuple[
  Float[Array, "t"], Float[Array, "t"], Float[Array, "blocks tokens vocab"]
]:
  """`statistics`, and the softmax of the logits in blocks of tokens."""
  vocab = head.shape[0]
  tokens = _Tokens.of(head, targets, bears)

  def tokens_block(hidden, targets):
    logits = product(hidden, head, contract=(1, 1))
    peak = jnp.max(logits, axis=1)
    powers = jnp.exp(logits - peak[:, None])
    total = jnp.sum(powers, axis=1)
    place = jnp.clip(targets, 0, vocab - 1)
    target_logits = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
    target_logits = jnp.where(place == targets, target_logits, 0.0)
    chances = powers * (1 / total)[:, None]
    return peak + jnp.log(total), target_logits, chances

  normalizers, target_logits, chances = tokens.map(
    tokens_block, tokens.split(hidden), tokens.split(targets)
  )
  return tokens.join(normalizers), tokens.join(target_logits), chances


def gradients(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  *,
  normalizers: Float[Array, "t"],
  d_normalizers: Float[Array, "t"],
  d_logits: Float[Array, "t"],
  bears: Bool[Array, "t"] | None = None,
  chances: Float[Array, "blocks tokens vocab"] | None = None,
) -> tuple[Float[Array, "t d"], Float[Array, "vocab d"]]:
  """Pulls the gradients of `statistics` back to hidden and head.

  Tokens that do not bear loss have no gradient. `chances` from
  `statistics_and_chances` saves computing them again.
  """
  dtype = head.dtype
  tokens = _Tokens.of(head, targets, bears)
  given = hidden, targets, normalizers, d_normalizers, d_logits
  split = tuple(map(tokens.split, given))
  blocks = *split, chances

  def words_block(i, state):
    d_hidden, d_head = state
    rows, ids, fresh = _words(head, i)

    def tokens_block(n, state):
      d_rows, d_hidden = state
      hidden, targets, normalizers, d_normalizers, d_logits, chances = (
        jax.tree.map(lambda x: x[n], blocks)
      )
      if chances is None:
        logits = product(hidden, rows, contract=(1, 1))
        chances = jnp.exp(logits - normalizers[:, None])
      d_block = d_normalizers[:, None] * chances
      d_block += jnp.where(ids == targets[:, None], d_logits[:, None], 0.0)
      d_block = _where(fresh, d_block, 0.0).astype(dtype)
      d_rows += product(d_block, hidden, contract=(0, 0))
      return d_rows, d_hidden.at[n].add(product(d_block, rows))

    d_rows = jnp.zeros(rows.shape, jnp.float32)
    d_rows, d_hidden = lax.fori_loop(
      0, tokens.num_blocks, tokens_block, (d_rows, d_hidden)
    )
    start = _start(head, i)
    # Rows that an earlier block has filled get zeros added.
    d_rows = d_rows.astype(dtype) + lax.dynamic_slice_in_dim(
      d_head, start, rows.shape[0]
    )
    return d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_rows, start, 0)

  d_hidden = jnp.zeros(split[0].shape, jnp.float32)
  state = (d_hidden, jnp.zeros_like(head))
  num_blocks, _ = _word_blocks(head)
  d_hidden, d_head = lax.fori_loop(0, num_blocks, words_block, state)
  return tokens.join(d_hidden).astype(hidden.dtype), d_head


def _word_blocks(head):
  """Number and size of the blocks of words."""
  return even_blocks(head.shape[0], _WORDS)


def _start(head, i):
  """First row of block i; the last block reaches back to keep its size."""
  _, size = _word_blocks(head)
  return jnp.minimum(i * size, head.shape[0] - size)


def _words(head, i):
  """Rows of block i, their ids, and which of them no earlier block has held.

  None stands for all of them: masking costs a tenth of a small loss.
  """
  _, size = _word_blocks(head)
  start = _start(head, i)
  ids = start + lax.broadcasted_iota(jnp.int32, (1, size), 1)
  rows = lax.dynamic_slice_in_dim(head, start, size)
  return rows, ids, ids >= i * size if head.shape[0] % size else None


def _where(kept, x, otherwise):
  return x if kept is None else jnp.where(kept, x, otherwise)


class _Tokens(NamedTuple):
  """Cuts [t ...] into blocks, those that bear loss first."""

  length: int
  shape: tuple[int, int]  # Blocks, tokens of a block.
  num_blocks: Int[Array, ""] | int  # That hold a token that bears loss.
  order: Int[Array, "t"] | None  # Tokens in that order; None is their own.
  places: Int[Array, "t"] | None  # Where each token went.

  @classmethod
  def of(cls, head, targets, bears) -> "_Tokens":
    _, words = _word_blocks(head)
    largest = block_elements(dispatch.target().platform) // words
    length = len(targets)
    shape = even_blocks(length, max(largest, _MIN_TOKENS))
    if bears is None:
      return cls(length, shape, shape[0], None, None)
    first = jnp.cumsum(bears)
    others = first[-1] + jnp.cumsum(~bears)
    places = jnp.where(bears, first, others) - 1
    index = jnp.arange(length)
    order = jnp.zeros_like(index).at[places].set(index, unique_indices=True)
    return cls(length, shape, -(-first[-1] // shape[1]), order, places)

  def split(self, x):
    """[t ...] to [blocks, size, ...], with zeros behind."""
    if self.order is not None:
      x = x[self.order]
    count, size = self.shape
    padding = [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  def join(self, x):
    """What `split` did, undone."""
    x = x.reshape(-1, *x.shape[2:])
    return x[: self.length] if self.places is None else x[self.places]

  def map(self, function, *blocks):
    """Its results for the blocks that bear loss, zeros for others."""
    shapes = jax.eval_shape(function, *(x[0] for x in blocks))
    zeros = jax.tree.map(
      lambda s: jnp.zeros((self.shape[0], *s.shape), s.dtype), shapes
    )

    def one(n, results):
      found = function(*(x[n] for x in blocks))
      return jax.tree.map(lambda old, x: old.at[n].set(x), results, found)

    return lax.fori_loop(0, self.num_blocks, one, zeros)
