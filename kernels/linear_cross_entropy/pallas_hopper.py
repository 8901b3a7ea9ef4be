"""Mosaic GPU kernels (Hopper): logits live in registers only.

The gradient of the logits is what a GPU's shared memory cannot hold a row of
(d is thousands of numbers wide), so it goes through HBM in bfloat16, some
thousand words at a time, and cuBLAS multiplies it with hidden and head.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import hopper
from argenseg_jax.kernels.hopper import across
from argenseg_jax.kernels.products import block_elements, product

_TILE = hopper.Tile(rows=128, columns=128)


def statistics(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
) -> tuple[Float[Array, "t"], Float[Array, "t"]]:
  """Log-sum-exp of the logits and the target's logit, float32.

  A target outside the vocabulary has logit 0.

  Raises:
    ValueError: the kernels cannot multiply such arrays.
  """
  _check(hidden)
  vocab = head.shape[0]

  def step(carry, block):
    peak, total, chosen = carry
    (targets,) = block.numbers
    logits, ids = block.values, block.columns()
    hits = jnp.where(ids == across(targets, ids), logits, 0.0)
    # Beyond the vocabulary logits are 0, before `known` excludes them.
    logits = hopper.known(block, vocab)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
    block_total = jnp.sum(jnp.exp(logits - across(new_peak, logits)), axis=1)
    total = total * jnp.exp(peak - new_peak) + block_total
    return new_peak, total, chosen + jnp.sum(hits, axis=1)

  def initial():
    zeros = jnp.zeros(_TILE.rows, jnp.float32)
    return jnp.full(_TILE.rows, -jnp.inf, jnp.float32), zeros, zeros

  peaks, totals, chosen = hopper.reduce_blocks(
    hidden,
    head,
    numbers=(targets,),
    initial=initial,
    step=step,
    outputs=(jnp.float32,) * 3,
    tile=_TILE,
    name="linear_cross_entropy_statistics",
  )
  peak = jnp.max(peaks, axis=0)
  total = jnp.sum(totals * jnp.exp(peaks - peak), axis=0)
  return peak + jnp.log(total), jnp.sum(chosen, axis=0)


def gradients(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  *,
  normalizers: Float[Array, "t"],
  d_normalizers: Float[Array, "t"],
  d_logits: Float[Array, "t"],
) -> tuple[Float[Array, "t d"], Float[Array, "vocab d"]]:
  """Pulls the gradients of `statistics` back to hidden and head."""
  _check(hidden)
  vocab, d = head.shape
  t = hidden.shape[0]
  words = max(block_elements("gpu") * 2 // t // 1024, 1) * 1024
  words = min(words, vocab)

  def of_words(start, rows):
    d_block = _logits_gradient(
      hidden, rows, (targets - start, normalizers, d_normalizers, d_logits)
    )
    d_rows = product(d_block, hidden, contract=(0, 0)).astype(head.dtype)
    return product(d_block, rows), d_rows

  def some_words(i, state):
    d_hidden, d_head = state
    start = i * words
    rows = lax.dynamic_slice_in_dim(head, start, words)
    more, d_rows = of_words(start, rows)
    d_head = lax.dynamic_update_slice_in_dim(d_head, d_rows, start, 0)
    return d_hidden + more, d_head

  count = vocab // words
  state = (jnp.zeros((t, d), jnp.float32), jnp.zeros_like(head))
  d_hidden, d_head = lax.fori_loop(0, count, some_words, state)
  if start := count * words % vocab:
    more, d_rows = of_words(start, head[start:])
    d_hidden += more
    d_head = lax.dynamic_update_slice_in_dim(d_head, d_rows, start, 0)
  return d_hidden.astype(hidden.dtype), d_head


def _logits_gradient(hidden, head, numbers):
  """bfloat16 [t words]; targets count from the first of these words."""

  def function(block):
    targets, normalizers, d_normalizers, d_logits = block.numbers
    logits, ids = block.values, block.columns()
    chances = jnp.exp(logits - across(normalizers, logits))
    gradient = across(d_normalizers, logits) * chances
    hits = ids == across(targets, ids)
    return gradient + jnp.where(hits, across(d_logits, logits), 0.0)

  return hopper.map_blocks(
    hidden,
    head,
    function=function,
    numbers=numbers,
    tile=_TILE,
    name="linear_cross_entropy_d_logits",
  )


def _check(hidden):
  refusal = hopper.refusal(hidden.shape[1], hidden.dtype)
  if refusal:
    raise ValueError(
      f"the GPU kernel of linear_cross_entropy cannot run: {refusal}; "
      "use implementation='xla'."
    )
