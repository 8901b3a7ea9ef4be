"""Blocks of tokens and words in plain XLA: any backend, no logits in memory.

For the gradient, logits are computed again: four products instead of three. On
a CPU that is a third more time, which a small loss need not pay: where all of
its probabilities take 16 MiB at most, they are kept (`keeps_chances`), and only
the second matrix of that size, the gradient of the logits, is spared.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import dispatch
from argenseg_jax.kernels.products import block_elements, even_blocks, product

_WORDS = 8192  # Words of a block; a smaller vocabulary is one block.
_MIN_TOKENS = 128
_MAX_KEPT = 2**22  # Probabilities.


def statistics(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
) -> tuple[Float[Array, "t"], Float[Array, "t"]]:
  """Log-sum-exp of the logits and the target's logit, float32.

  A target outside the vocabulary has logit 0.
  """
  num_blocks, _ = _word_blocks(head)
  (hidden, targets), length = _split_tokens(head, hidden, targets)

  def tokens_block(block):
    hidden, targets = block

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

  normalizers, target_logits = lax.map(tokens_block, (hidden, targets))
  return normalizers.reshape(-1)[:length], target_logits.reshape(-1)[:length]


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
) -> tuple[
  Float[Array, "t"], Float[Array, "t"], Float[Array, "blocks tokens vocab"]
]:
  """`statistics`, and the softmax of the logits in blocks of tokens."""
  vocab = head.shape[0]
  blocks, length = _split_tokens(head, hidden, targets)

  def tokens_block(block):
    hidden, targets = block
    logits = product(hidden, head, contract=(1, 1))
    peak = jnp.max(logits, axis=1)
    powers = jnp.exp(logits - peak[:, None])
    total = jnp.sum(powers, axis=1)
    place = jnp.clip(targets, 0, vocab - 1)
    target_logits = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
    target_logits = jnp.where(place == targets, target_logits, 0.0)
    chances = powers * (1 / total)[:, None]
    return peak + jnp.log(total), target_logits, chances

  normalizers, target_logits, chances = lax.map(tokens_block, blocks)
  flat = (x.reshape(-1)[:length] for x in (normalizers, target_logits))
  return *flat, chances


def gradients(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  *,
  normalizers: Float[Array, "t"],
  d_normalizers: Float[Array, "t"],
  d_logits: Float[Array, "t"],
  chances: Float[Array, "blocks tokens vocab"] | None = None,
) -> tuple[Float[Array, "t d"], Float[Array, "vocab d"]]:
  """Pulls the gradients of `statistics` back to hidden and head.

  `chances` from `statistics_and_chances` saves computing them again.
  """
  dtype = head.dtype
  blocks, length = _split_tokens(
    head, hidden, targets, normalizers, d_normalizers, d_logits
  )

  def words_block(i, state):
    d_hidden, d_head = state
    rows, ids, fresh = _words(head, i)

    def tokens_block(d_rows, block):
      numbers, chances, d_hidden = block
      hidden, targets, normalizers, d_normalizers, d_logits = numbers
      if chances is None:
        logits = product(hidden, rows, contract=(1, 1))
        chances = jnp.exp(logits - normalizers[:, None])
      d_block = d_normalizers[:, None] * chances
      d_block += jnp.where(ids == targets[:, None], d_logits[:, None], 0.0)
      d_block = _where(fresh, d_block, 0.0).astype(dtype)
      d_rows += product(d_block, hidden, contract=(0, 0))
      return d_rows, d_hidden + product(d_block, rows)

    d_rows = jnp.zeros(rows.shape, jnp.float32)
    d_rows, d_hidden = lax.scan(
      tokens_block, d_rows, (blocks, chances, d_hidden)
    )
    start = _start(head, i)
    # Rows that an earlier block has filled get zeros added.
    d_rows = d_rows.astype(dtype) + lax.dynamic_slice_in_dim(
      d_head, start, rows.shape[0]
    )
    return d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_rows, start, 0)

  d_hidden = jnp.zeros(blocks[0].shape, jnp.float32)
  state = (d_hidden, jnp.zeros_like(head))
  num_blocks, _ = _word_blocks(head)
  d_hidden, d_head = lax.fori_loop(0, num_blocks, words_block, state)
  d_hidden = d_hidden.reshape(-1, hidden.shape[1])[:length]
  return d_hidden.astype(hidden.dtype), d_head


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


def _split_tokens(head, *arrays):
  """Pads each [t ...] with zeros and cuts it into [blocks, size, ...].

  Returns the arrays and t.
  """
  _, words = _word_blocks(head)
  largest = block_elements(dispatch.target().platform) // words
  length = arrays[0].shape[0]
  count, size = even_blocks(length, max(largest, _MIN_TOKENS))

  def split(x):
    padding = [(0, count * size - length)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  return jax.tree.map(split, arrays), length
