"""The definition of correct: plain JAX over the whole matrix of logits."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import noise
from argenseg_jax.kernels.products import product


def predict(
  hidden: Float[Array, "r d"],
  code_head: Float[Array, "codes d"],
  codebook: Float[Array, "codes c"],
  *,
  seed: Int[Array, "4"] | None,
  temperature: float,
  top_k: int | None,
  rows: Int[Array, "r"] | None = None,
  lowest: Float[Array, "r"] | None = None,
) -> tuple[
  Int[Array, "r"], Float[Array, "r c"], Float[Array, "r"], Float[Array, "r"]
]:
  """Codes, latents, their logits, and the log-sum-exp of all logits.

  Args:
    seed: from `noise.make_seed`; None takes the arg-max.
    rows: which row of the noise each row takes; 0.. by default.
    lowest: draws only from codes whose logit is at least that; what `top_k`
      finds out by itself.
  """
  logits = product(hidden, code_head, contract=(1, 1))
  scores = logits
  if seed is not None:
    scores = logits / temperature
    if top_k is not None:
      lowest = lax.top_k(logits, top_k)[0][:, -1]
    if lowest is not None:
      scores = jnp.where(logits >= lowest[:, None], scores, -jnp.inf)
    if rows is None:
      rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    columns = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    scores += noise.gumbel(seed, rows[:, None], columns)
  codes = jnp.argmax(scores, axis=1).astype(jnp.int32)
  chosen = jnp.take_along_axis(logits, codes[:, None], axis=1)[:, 0]
  log_sum_exp = jax.nn.logsumexp(logits, axis=1)
  return codes, jnp.take(codebook, codes, axis=0), chosen, log_sum_exp
