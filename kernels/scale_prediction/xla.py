"""The reference, one block of rows at a time: any backend."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import dispatch
from argenseg_jax.kernels.products import block_elements
from argenseg_jax.kernels.scale_prediction import reference


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
  block = block_elements(dispatch.target().platform) // code_head.shape[0]
  block = max(block, 8)
  options = {"seed": seed, "temperature": temperature, "top_k": top_k}
  if hidden.shape[0] <= block:
    return reference.predict(hidden, code_head, codebook, **options)

  def one_row(row):
    hidden, index = row
    results = reference.predict(
      hidden[None], code_head, codebook, rows=index[None], **options
    )
    return tuple(x[0] for x in results)

  rows = jnp.arange(hidden.shape[0], dtype=jnp.int32)
  return lax.map(one_row, (hidden, rows), batch_size=block)
