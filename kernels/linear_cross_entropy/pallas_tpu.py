"""Mosaic TPU kernels over blocks of logits that live in VMEM only.

Blocks of logits stand as [words tokens]: numbers per token (log-sum-exp,
targets) are rows of lanes, and reductions over the words cross no lanes. Each
of the two gradients has its own kernel, which computes the logits again: one
kernel for both would keep a float32 gradient in HBM.

Sizes need not be multiples of the blocks. What lies outside an array is
undefined, so it is replaced wherever it would enter a sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels.chips import blocks
from argenseg_jax.kernels.products import (
  at_least_eight_rows,
  column_slices,
  product,
  row_products,
)

# What changes once per pass over the other matrix needs no second buffer.
_ONCE = pl.Buffered(1)


def statistics(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
) -> tuple[Float[Array, "t"], Float[Array, "t"]]:
  """Log-sum-exp of the logits and the target's logit, float32.

  A target outside the vocabulary has logit 0.
  """
  length = hidden.shape[0]
  hidden, targets = at_least_eight_rows(hidden), at_least_eight_rows(targets)
  (t, d), vocab, size = hidden.shape, head.shape[0], hidden.dtype.itemsize

  def bytes_needed(block):
    sides = block.tokens + block.words
    slices = 512 * 8 * sides
    kept = d * size * (block.tokens + 2 * block.words)
    return kept + slices + 5 * 4 * block.tokens * block.words

  block = blocks(vocab, t, bytes_needed)
  per_token = pl.BlockSpec((1, block.tokens), lambda i, j: (0, i))
  normalizers, logits = pl.pallas_call(
    functools.partial(_statistics_kernel, vocab=vocab),
    grid=(pl.cdiv(t, block.tokens), pl.cdiv(vocab, block.words)),
    in_specs=[
      pl.BlockSpec((block.tokens, d), lambda i, j: (i, 0), pipeline_mode=_ONCE),
      pl.BlockSpec((block.words, d), lambda i, j: (j, 0)),
      per_token,
    ],
    out_specs=[per_token, per_token],
    out_shape=[jax.ShapeDtypeStruct((1, t), jnp.float32)] * 2,
    scratch_shapes=[pltpu.VMEM((1, block.tokens), jnp.float32)] * 2,
    compiler_params=_COMPILER_PARAMS,
    cost_estimate=_cost(1, hidden, head, block.tokens),
    name="linear_cross_entropy_statistics",
  )(hidden, head, targets[None])
  return normalizers[0, :length], logits[0, :length]


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
  per_token = (targets, normalizers, d_normalizers, d_logits)
  rows = (at_least_eight_rows(x)[None] for x in per_token)
  inputs = (at_least_eight_rows(hidden), head, *rows)
  d_hidden = _gradient("hidden", *inputs)[: hidden.shape[0]]
  return d_hidden, _gradient("head", *inputs)


def _gradient(which, hidden, head, *per_token):
  (t, d), vocab, size = hidden.shape, head.shape[0], hidden.dtype.itemsize
  to_hidden = which == "hidden"

  def bytes_needed(block):
    outer, inner = block.tokens, block.words
    if not to_hidden:
      outer, inner = inner, outer
    # Outer input, its gradient, its float32 sum; the inner input twice.
    kept = d * (outer * (2 * size + 4) + inner * 2 * size)
    slices = 512 * (4 * outer + 8 * (outer + inner))
    return kept + slices + 6 * 4 * outer * inner

  outer = "tokens" if to_hidden else "words"
  block = blocks(vocab, t, bytes_needed, outer=outer)
  grid = (pl.cdiv(t, block.tokens), pl.cdiv(vocab, block.words))
  if to_hidden:
    token, word = lambda i, j: i, lambda i, j: j
    out, out_rows, summed = hidden, block.tokens, head
  else:
    grid = grid[::-1]
    token, word = lambda i, j: j, lambda i, j: i
    out, out_rows, summed = head, block.words, hidden
  number = pl.BlockSpec((1, block.tokens), lambda i, j: (0, token(i, j)))
  return pl.pallas_call(
    functools.partial(_gradient_kernel, t=t, vocab=vocab, to_hidden=to_hidden),
    grid=grid,
    in_specs=[
      pl.BlockSpec(
        (block.tokens, d),
        lambda i, j: (token(i, j), 0),
        pipeline_mode=_ONCE if to_hidden else None,
      ),
      pl.BlockSpec(
        (block.words, d),
        lambda i, j: (word(i, j), 0),
        pipeline_mode=None if to_hidden else _ONCE,
      ),
      *[number] * 4,
    ],
    out_specs=pl.BlockSpec(
      (out_rows, d), lambda i, j: (i, 0), pipeline_mode=_ONCE
    ),
    out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
    scratch_shapes=[pltpu.VMEM((out_rows, d), jnp.float32)],
    compiler_params=_COMPILER_PARAMS,
    cost_estimate=_cost(2, out, summed, out_rows, writes=True),
    name=f"linear_cross_entropy_d_{which}",
  )(hidden, head, *per_token)


def _statistics_kernel(
  hidden_ref,
  head_ref,
  targets_ref,
  normalizers_ref,
  logits_ref,
  peak_ref,
  total_ref,
  *,
  vocab,
):
  j = pl.program_id(1)

  @pl.when(j == 0)
  def _():
    peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    logits_ref[...] = jnp.zeros_like(logits_ref)

  logits = row_products(head_ref, hidden_ref)
  ids = j * logits.shape[0] + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
  hit = ids == targets_ref[...]
  if vocab % logits.shape[0]:
    logits = jnp.where(ids < vocab, logits, -jnp.inf)
    hit &= ids < vocab
  peak = jnp.maximum(peak_ref[...], jnp.max(logits, axis=0, keepdims=True))
  total = jnp.sum(jnp.exp(logits - peak), axis=0, keepdims=True)
  total_ref[...] = total_ref[...] * jnp.exp(peak_ref[...] - peak) + total
  peak_ref[...] = peak
  logits_ref[...] += jnp.sum(jnp.where(hit, logits, 0.0), axis=0, keepdims=True)

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    normalizers_ref[...] = peak_ref[...] + jnp.log(total_ref[...])


def _gradient_kernel(
  hidden_ref,
  head_ref,
  targets_ref,
  normalizers_ref,
  d_normalizers_ref,
  d_logits_ref,
  out_ref,
  sum_ref,
  *,
  t,
  vocab,
  to_hidden,
):
  inner = pl.program_id(1)

  @pl.when(inner == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  logits = row_products(head_ref, hidden_ref)
  word = pl.program_id(int(to_hidden)) * logits.shape[0]
  ids = word + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
  d_block = d_normalizers_ref[...] * jnp.exp(logits - normalizers_ref[...])
  d_block += jnp.where(ids == targets_ref[...], d_logits_ref[...], 0.0)
  if to_hidden:
    summed_ref, length, axis = head_ref, vocab, 0
  else:
    summed_ref, length, axis = hidden_ref, t, 1
  size = summed_ref.shape[0]
  ragged, kept = length % size, length - inner * size
  if ragged:
    place = lax.broadcasted_iota(jnp.int32, d_block.shape, axis)
    d_block = jnp.where(place < kept, d_block, 0.0)
  d_block = d_block.astype(summed_ref.dtype)
  for columns in column_slices(summed_ref.shape[1]):
    summed = summed_ref[:, columns]
    if ragged:
      place = lax.broadcasted_iota(jnp.int32, summed.shape, 0)
      summed = jnp.where(place < kept, summed, jnp.zeros_like(summed))
    sum_ref[:, columns] += product(d_block, summed, contract=(axis, 0))

  @pl.when(inner == pl.num_programs(1) - 1)
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)


_COMPILER_PARAMS = pltpu.CompilerParams(
  dimension_semantics=("parallel", "arbitrary")
)


def _cost(products, outer, inner, block, *, writes=False):
  """Work of so many products; `inner` is read once per block of `outer`."""
  (rows, d), length = outer.shape, inner.shape[0]
  reads = outer.size * (1 + writes) + pl.cdiv(rows, block) * inner.size
  return pl.CostEstimate(
    flops=2 * products * rows * length * d,
    transcendentals=rows * length,
    bytes_accessed=reads * outer.dtype.itemsize,
  )
