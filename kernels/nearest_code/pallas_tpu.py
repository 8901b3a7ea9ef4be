"""Mosaic TPU kernel: distances of one block at a time, [codes latents].

The nearest code so far is kept per latent; a strictly nearer one replaces it,
so ties stay with the first code.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels.chips import blocks
from argenseg_jax.kernels.products import at_least_eight_rows, row_products


def nearest(
  latent: Float[Array, "n c"],
  codebook: Float[Array, "codes c"],
  bias: Float[Array, "codes"],
) -> Int[Array, "n"]:
  """First arg-min of bias - 2 latent . code."""
  rows = latent.shape[0]
  latent = at_least_eight_rows(latent)
  (n, c), codes = latent.shape, codebook.shape[0]

  def bytes_needed(block):
    # Fewer than 128 columns still take a whole vector register's lanes.
    inputs = 2 * 4 * max(c, 128) * (block.tokens + 2 * block.words)
    return inputs + 4 * 4 * block.tokens * block.words

  block = blocks(codes, n, bytes_needed)
  return pl.pallas_call(
    functools.partial(_kernel, codes=codes),
    grid=(pl.cdiv(n, block.tokens), pl.cdiv(codes, block.words)),
    in_specs=[
      pl.BlockSpec((block.tokens, c), lambda i, j: (i, 0)),
      pl.BlockSpec((block.words, c), lambda i, j: (j, 0)),
      pl.BlockSpec((block.words, 1), lambda i, j: (j, 0)),
    ],
    out_specs=pl.BlockSpec((1, block.tokens), lambda i, j: (0, i)),
    out_shape=jax.ShapeDtypeStruct((1, n), jnp.int32),
    scratch_shapes=[pltpu.VMEM((1, block.tokens), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * n * codes * c,
      transcendentals=0,
      bytes_accessed=4 * c * (n + pl.cdiv(n, block.tokens) * codes),
    ),
    name="nearest_code",
  )(latent, codebook, bias[:, None])[0, :rows]


def _kernel(latent_ref, codebook_ref, bias_ref, index_ref, best_ref, *, codes):
  j = pl.program_id(1)

  @pl.when(j == 0)
  def _():
    best_ref[...] = jnp.full_like(best_ref, jnp.inf)
    index_ref[...] = jnp.zeros_like(index_ref)

  size = codebook_ref.shape[0]
  products = row_products(codebook_ref, latent_ref)
  distances = bias_ref[...] - 2 * products
  local = lax.broadcasted_iota(jnp.int32, distances.shape, 0)
  if codes % size:
    distances = jnp.where(local < codes - j * size, distances, jnp.inf)
  best = jnp.min(distances, axis=0, keepdims=True)
  place = jnp.min(
    jnp.where(distances == best, local, size), axis=0, keepdims=True
  )
  nearer = best < best_ref[...]
  index_ref[...] = jnp.where(nearer, j * size + place, index_ref[...])
  best_ref[...] = jnp.where(nearer, best, best_ref[...])
