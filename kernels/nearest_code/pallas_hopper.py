"""Mosaic GPU kernel (Hopper): distances in registers, exact to float32.

Tensor cores multiply bfloat16, so every float32 is split into three bfloat16
that add up to it. The six products of parts that matter, and the bias, stand
side by side in one longer product: one row of it holds all parts of a latent,
one column those of a code.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import hopper

_TILE = hopper.Tile(rows=128, columns=128)
# Parts of the latent and of the code; what is left out is below 2^-24.
_PAIRS = ((0, 0), (0, 1), (1, 0), (0, 2), (2, 0), (1, 1))


def nearest(
  latent: Float[Array, "n c"],
  codebook: Float[Array, "codes c"],
  bias: Float[Array, "codes"],
) -> Int[Array, "n"]:
  """First arg-min of bias - 2 latent . code."""
  codes = codebook.shape[0]
  latent_parts, code_parts = _split(2 * latent), _split(codebook)
  # An infinite bias has no parts; so far away, a code is as good as excluded.
  bias_parts = _split(jnp.clip(bias, max=1e38)[:, None])
  minus_one = jnp.full((latent.shape[0], 3), -1, jnp.bfloat16)
  a = jnp.concatenate([*(latent_parts[i] for i, _ in _PAIRS), minus_one], 1)
  b = jnp.concatenate([*(code_parts[j] for _, j in _PAIRS), *bias_parts], 1)
  padding = ((0, 0), (0, -a.shape[1] % hopper.DEPTH))

  def initial():
    lowest = jnp.full(_TILE.rows, -jnp.inf, jnp.float32)
    return lowest, jnp.zeros(_TILE.rows, jnp.int32)

  def step(carry, block):
    best, chosen = carry
    scores = hopper.known(block, codes)
    block_best, block_code = hopper.first_best(block, scores)
    better = block_best > best
    return (
      jnp.where(better, block_best, best),
      jnp.where(better, block_code, chosen),
    )

  best, chosen = hopper.reduce_blocks(
    jnp.pad(a, padding),
    jnp.pad(b, padding),
    initial=initial,
    step=step,
    outputs=(jnp.float32, jnp.int32),
    tile=_TILE,
    name="nearest_code",
  )
  share = jnp.argmax(best, axis=0)[None]
  return jnp.take_along_axis(chosen, share, axis=0)[0]


def _split(x):
  """Three bfloat16 arrays that add up to float32 x.

  `reduce_precision` rounds for certain; XLA may leave out a cast and its
  reverse.
  """
  parts = []
  for _ in range(3):
    part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(jnp.bfloat16))
    x = x - part
  return parts
