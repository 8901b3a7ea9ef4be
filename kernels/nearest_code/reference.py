"""The definition of correct: plain JAX over the whole matrix of distances."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels.products import product


def nearest(
  latent: Float[Array, "n c"],
  codebook: Float[Array, "codes c"],
  bias: Float[Array, "codes"],
) -> Int[Array, "n"]:
  """First arg-min of bias - 2 latent . code."""
  distances = bias - 2 * product(latent, codebook, contract=(1, 1))
  return jnp.argmin(distances, axis=1).astype(jnp.int32)
