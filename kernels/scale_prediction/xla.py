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
  lowest: Float[Array, "r"] | None = None,
) -> tuple[
  Int[Array, "r"], Float[Array, "r c"], Float[Array, "r"], Float[Array, "r"]
]:
  """Codes, latents, their logits, and the log-sum-exp of all logits.

  Args are those of the reference.
  """
  options = {"seed": seed, "temperature": temperature, "top_k": top_k}
  block = _rows(code_head)
  if hidden.shape[0] <= block:
    return reference.predict(
      hidden, code_head, codebook, lowest=lowest, **options
    )

  def one_row(row):
    hidden, index, lowest = row
    results = reference.predict(
      hidden[None],
      code_head,
      codebook,
      rows=index[None],
      lowest=None if lowest is None else lowest[None],
      **options,
    )
    return tuple(x[0] for x in results)

  rows = jnp.arange(hidden.shape[0], dtype=jnp.int32)
  return lax.map(one_row, (hidden, rows, lowest), batch_size=block)


def _rows(code_head):
  """Rows of a block."""
  elements = block_elements(dispatch.target().platform)
  return max(elements // code_head.shape[0], 8)
