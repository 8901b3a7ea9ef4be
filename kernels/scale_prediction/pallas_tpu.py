"""Mosaic TPU kernel: product, choice and codebook row in one pass over codes.

Blocks of logits stand as [codes rows] in VMEM: numbers per row are rows of
lanes, and reductions over the codes cross no lanes. The best score so far is
kept with its code, logit and codebook row; a strictly better one replaces it,
so ties stay with the lowest code. Sampling waits until all logits of the
block's rows stand in VMEM, finds the k-th highest there, and then goes through
them in small pieces, because drawing noise takes many instructions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import noise
from argenseg_jax.kernels.chips import blocks
from argenseg_jax.kernels.products import (
  at_least_eight_rows,
  product,
  row_products,
)

_LOWEST_KEY = np.int32(-(2**31))


def predict(
  hidden: Float[Array, "r d"],
  code_head: Float[Array, "codes d"],
  codebook: Float[Array, "codes c"],
  *,
  seed: Int[Array, "4"] | None,
  temperature: float,
  top_k: int | None,
) -> tuple[
  Int[Array, "r"], Float[Array, "r c"], Float[Array, "r"], Float[Array, "r"]
]:
  """Codes, latents, their logits, and the log-sum-exp of all logits."""
  rows = hidden.shape[0]
  hidden = at_least_eight_rows(hidden)
  (r, d), (codes, c) = hidden.shape, codebook.shape
  size, sampled = hidden.dtype.itemsize, seed is not None

  def bytes_needed(block):
    sides = block.tokens + block.words
    inputs = d * size * (block.tokens + 2 * block.words) + 512 * 8 * sides
    book = 2 * 4 * c * (block.words + 2 * block.tokens)
    kept = 4 * (codes + block.words) * block.tokens if sampled else 0
    return inputs + book + kept + 6 * 4 * block.tokens * block.words

  block = blocks(codes, r, bytes_needed)
  num_blocks = pl.cdiv(codes, block.words)
  piece = 128 if sampled and block.words % 128 == 0 else block.words
  pieces = num_blocks * block.words // piece
  # One codebook row per lane; zeros after the last.
  book = jnp.pad(codebook, ((0, pieces * piece - codes), (0, 0)))
  book = book.reshape(pieces, piece, c).swapaxes(1, 2)
  book_spec = pl.BlockSpec((1, c, piece), lambda i, j: (j, 0, 0))
  number = pl.BlockSpec((1, block.tokens), lambda i, j: (0, i))
  scratch = [pltpu.VMEM((1, block.tokens), jnp.float32)] * 3
  scratch.append(pltpu.VMEM((c, block.tokens), jnp.float32))
  if sampled:
    book_spec = pl.BlockSpec(book.shape, lambda i, j: (0, 0, 0))
    logits_shape = (pieces, piece, block.tokens)
    scratch.append(pltpu.VMEM(logits_shape, jnp.float32))
  chosen, latents, logits, log_sum_exp = pl.pallas_call(
    functools.partial(
      _kernel,
      codes=codes,
      temperature=temperature if sampled else None,
      top_k=top_k,
    ),
    grid=(pl.cdiv(r, block.tokens), num_blocks),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec(
        (block.tokens, d), lambda i, j: (i, 0), pipeline_mode=pl.Buffered(1)
      ),
      pl.BlockSpec((block.words, d), lambda i, j: (j, 0)),
      book_spec,
    ],
    out_specs=[
      number,
      pl.BlockSpec((c, block.tokens), lambda i, j: (0, i)),
      number,
      number,
    ],
    out_shape=[
      jax.ShapeDtypeStruct((1, r), jnp.int32),
      jax.ShapeDtypeStruct((c, r), codebook.dtype),
      jax.ShapeDtypeStruct((1, r), jnp.float32),
      jax.ShapeDtypeStruct((1, r), jnp.float32),
    ],
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * r * codes * (d + c),
      transcendentals=r * codes * (3 if sampled else 1),
      bytes_accessed=(r + pl.cdiv(r, block.tokens) * codes) * d * size,
    ),
    name="scale_prediction",
  )(
    seed if sampled else jnp.zeros(4, jnp.int32),
    hidden,
    code_head,
    book,
  )
  latents = latents.T[:rows]
  return chosen[0, :rows], latents, logits[0, :rows], log_sum_exp[0, :rows]


def _kernel(
  seed_ref,
  hidden_ref,
  head_ref,
  book_ref,
  codes_ref,
  latents_ref,
  logits_ref,
  log_sum_exp_ref,
  best_ref,
  peak_ref,
  total_ref,
  row_ref,
  *kept_ref,
  codes,
  temperature,
  top_k,
):
  j = pl.program_id(1)
  last = pl.num_programs(1) - 1
  size = head_ref.shape[0]
  first_row = pl.program_id(0) * hidden_ref.shape[0]

  @pl.when(j == 0)
  def _():
    best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
    peak_ref[...] = jnp.full_like(peak_ref, -jnp.inf)
    for ref in (total_ref, codes_ref, logits_ref, row_ref):
      ref[...] = jnp.zeros_like(ref)

  logits = row_products(head_ref, hidden_ref)
  local = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
  if codes % size:
    logits = jnp.where(local < codes - j * size, logits, -jnp.inf)
  peak = jnp.maximum(peak_ref[...], jnp.max(logits, axis=0, keepdims=True))
  total = jnp.sum(jnp.exp(logits - peak), axis=0, keepdims=True)
  total_ref[...] = total_ref[...] * jnp.exp(peak_ref[...] - peak) + total
  peak_ref[...] = peak

  def choose(first_code, logits, book, lowest):
    """Takes the best of these codes where it beats the best one so far."""
    local = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    scores = logits
    if temperature is not None:
      scores = logits / temperature
      if lowest is not None:
        scores = jnp.where(logits >= lowest, scores, -jnp.inf)
      row = first_row + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
      scores += noise.gumbel(seed_ref, row, first_code + local)
    best = jnp.max(scores, axis=0, keepdims=True)
    place = jnp.min(
      jnp.where(scores == best, local, logits.shape[0]),
      axis=0,
      keepdims=True,
    )
    hit = local == place
    row = product(book.astype(jnp.float32), hit.astype(jnp.float32))
    logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=0, keepdims=True)
    better = best > best_ref[...]
    best_ref[...] = jnp.where(better, best, best_ref[...])
    codes_ref[...] = jnp.where(better, first_code + place, codes_ref[...])
    logits_ref[...] = jnp.where(better, logit, logits_ref[...])
    row_ref[...] = jnp.where(better, row, row_ref[...])

  if temperature is None:
    choose(j * size, logits, book_ref[0], None)
  else:
    (kept,) = kept_ref
    pieces = size // kept.shape[1]
    kept[pl.ds(j * pieces, pieces)] = logits.reshape(pieces, *kept.shape[1:])

  @pl.when(j == last)
  def _():
    if temperature is not None:
      lowest = None if top_k is None else _kth_highest(kept, top_k)

      @pl.loop(0, kept.shape[0])
      def _(i):
        choose(i * kept.shape[1], kept[i], book_ref[i], lowest)

    latents_ref[...] = row_ref[...].astype(latents_ref.dtype)
    log_sum_exp_ref[...] = peak_ref[...] + jnp.log(total_ref[...])


def _kth_highest(logits_ref, k):
  """Exact k-th highest of [pieces codes rows] along the codes, [1 rows].

  Bisects over integers that are ordered as the floats are, bit by bit.
  """

  def as_key(bits):
    return bits ^ (lax.shift_right_arithmetic(bits, np.int32(31)) & 0x7FFFFFFF)

  def refine(step, key):
    candidate = key + lax.shift_left(np.int32(1), np.int32(31) - step)

    def count(piece, total):
      keys = as_key(lax.bitcast_convert_type(logits_ref[piece], jnp.int32))
      enough = (keys >= candidate).astype(jnp.float32)
      return total + jnp.sum(enough, axis=0, keepdims=True)

    total = jnp.zeros(candidate.shape, jnp.float32)
    total = lax.fori_loop(0, logits_ref.shape[0], count, total)
    return jnp.where(total >= k, candidate, key)

  key = jnp.full((1, logits_ref.shape[2]), _LOWEST_KEY)
  key = lax.fori_loop(0, 32, refine, key)
  return lax.bitcast_convert_type(as_key(key), jnp.float32)
