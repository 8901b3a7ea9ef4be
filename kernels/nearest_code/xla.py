"""The reference, one block of rows at a time: any backend."""

from jax import lax
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import dispatch
from argenseg_jax.kernels.nearest_code import reference
from argenseg_jax.kernels.products import block_elements


def nearest(
  latent: Float[Array, "n c"],
  codebook: Float[Array, "codes c"],
  bias: Float[Array, "codes"],
) -> Int[Array, "n"]:
  """First arg-min of bias - 2 latent . code."""
  platform = dispatch.target().platform
  rows = max(block_elements(platform) // codebook.shape[0], 8)
  # XLA divides the rows over its devices, but cannot divide a loop's steps.
  if latent.shape[0] <= rows or dispatch.partitioned():
    return reference.nearest(latent, codebook, bias)
  return lax.map(
    lambda row: reference.nearest(row[None], codebook, bias)[0],
    latent,
    batch_size=rows,
  )
