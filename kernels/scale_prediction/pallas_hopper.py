"""Mosaic GPU kernel (Hopper): product and choice in one pass over the codes.

Thread blocks share the codes out among themselves; each reports the best code
of its share, and XLA takes the best of those (a few numbers a row) and looks
its codebook row up. A strictly better code replaces the one before, and shares
are compared in order, so ties stay with the lowest code.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import hopper, noise


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
  """Codes, latents, their logits, and the log-sum-exp of all logits.

  Raises:
    ValueError: the kernel cannot run: dtype, width or `top_k`.
  """
  refusal = hopper.refusal(hidden.shape[1], hidden.dtype)
  if top_k is not None:
    refusal = "top_k needs all logits of a row in one place"
  if refusal:
    raise ValueError(
      f"the GPU kernel of scale_prediction cannot run: {refusal}; "
      "use implementation='xla'."
    )
  codes = code_head.shape[0]
  # Few rows: small blocks, so that many processors read the head at a time.
  # Noise: small blocks, because drawing it takes many registers.
  small = seed is not None or hidden.shape[0] <= 128
  tile = hopper.Tile(64, 64) if small else hopper.Tile(128, 128)

  def initial():
    zeros = jnp.zeros(tile.rows, jnp.float32)
    lowest = jnp.full(tile.rows, -jnp.inf, jnp.float32)
    return lowest, zeros.astype(jnp.int32), zeros, lowest, zeros

  def step(carry, block):
    best, chosen, logit, peak, total = carry
    logits = hopper.known(block, codes)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
    shifted = jnp.exp(logits - hopper.across(new_peak, logits))
    total = total * jnp.exp(peak - new_peak) + jnp.sum(shifted, axis=1)
    scores = logits
    if seed is not None:
      noisy = noise.gumbel(block.scalars, block.rows(), block.columns())
      scores = logits / temperature + noisy
    block_best, block_code = hopper.first_best(block, scores)
    hits = block.columns() == hopper.across(block_code, logits)
    block_logit = jnp.max(jnp.where(hits, logits, -jnp.inf), axis=1)
    better = block_best > best
    return (
      jnp.where(better, block_best, best),
      jnp.where(better, block_code, chosen),
      jnp.where(better, block_logit, logit),
      new_peak,
      total,
    )

  f32 = jnp.float32
  best, chosen, logits, peaks, totals = hopper.reduce_blocks(
    hidden,
    code_head,
    scalars=seed,
    initial=initial,
    step=step,
    outputs=(f32, jnp.int32, f32, f32, f32),
    tile=tile,
    # Far from the mean, noise is the logarithm of a number close to one.
    approximate=seed is None,
    name="scale_prediction",
  )
  share = jnp.argmax(best, axis=0)[None]
  chosen, logits = (
    jnp.take_along_axis(x, share, axis=0)[0] for x in (chosen, logits)
  )
  peak = jnp.max(peaks, axis=0)
  total = jnp.sum(totals * jnp.exp(peaks - peak), axis=0)
  latents = jnp.take(codebook, chosen, axis=0)
  return chosen, latents, logits, peak + jnp.log(total)
