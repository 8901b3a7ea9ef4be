"""The definition of correct: plain JAX over the whole matrix of logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels.products import product


def token_losses(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  *,
  z_loss: float = 0.0,
) -> Float[Array, "t"]:
  """Cross-entropy plus z-loss; a target outside the vocabulary has logit 0."""
  logits = product(hidden, head, contract=(1, 1))
  normalizers = jax.nn.logsumexp(logits, axis=-1)
  chosen = jax.nn.one_hot(targets, head.shape[0], dtype=jnp.float32)
  target_logits = jnp.sum(chosen * logits, axis=-1)
  return normalizers - target_logits + z_loss * jnp.square(normalizers)
