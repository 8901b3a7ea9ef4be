"""Nearest codebook row by squared L2, without the distances in memory."""

from jax import lax
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import dispatch


def nearest_code(
  latent: Float[Array, "n c"],
  codebook: Float[Array, "codes c"],
  *,
  cost: Float[Array, "codes"] | None = None,
  implementation: dispatch.Implementation | None = None,
) -> Int[Array, "n"]:
  """Index of the code with the least |latent - code|^2 + cost; first one wins.

  Distances are computed in float32 as |code|^2 - 2 latent . code + cost, which
  leaves out |latent|^2 because it moves no minimum. No gradient passes.

  Args:
    latent: float32 or bfloat16.
    codebook: float32 or bfloat16.
    cost: float32, added to each code's distance; for entropy-constrained codes.
    implementation: see `dispatch.load`.

  Returns:
    int32.
  """
  latent, codebook = (
    lax.stop_gradient(x).astype("float32") for x in (latent, codebook)
  )
  bias = (codebook**2).sum(1)
  if cost is not None:
    bias = bias + lax.stop_gradient(cost)
  module = dispatch.load("nearest_code", implementation)
  return module.nearest(latent, codebook, bias)
