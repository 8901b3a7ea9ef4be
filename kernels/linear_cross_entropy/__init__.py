"""Cross-entropy of a linear head, without the logits in memory."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import dispatch
from argenseg_jax.kernels.linear_cross_entropy import reference, xla


def linear_cross_entropy(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  weights: Float[Array, "t"],
  *,
  z_loss: float = 0.0,
  implementation: dispatch.Implementation | None = None,
) -> Float[Array, "t"]:
  """Weighted cross-entropy of softmax(hidden @ head.T) for each token.

  weights * (log_sum_exp - logit of the target + z_loss * log_sum_exp^2)

  Losses of several kinds (text, codes) come from one call: sum the result over
  the tokens of each kind. Differentiable once, with respect to `hidden`, `head`
  and `weights` (where they are not 0); logits are computed again, block by
  block, for the gradient.

  Args:
    hidden: last hidden states, bfloat16 or float32.
    head: one row per word, in the dtype of `hidden`.
    targets: int32; any value, negative too, where the weight is 0.
    weights: float32; 0 ignores a token, which then costs blocked XLA nothing.
    z_loss: weight of the squared log-sum-exp.
    implementation: see `dispatch.load`.

  Returns:
    float32; 0 where the weight is 0, so long as `hidden` is finite there.

  Raises:
    ValueError: dtypes that differ, or no such implementation.
  """
  if hidden.dtype != head.dtype:
    raise ValueError(
      f"hidden is {hidden.dtype} and head is {head.dtype}; cast one of them."
    )
  if implementation == "reference":
    losses = reference.token_losses(hidden, head, targets, z_loss=z_loss)
  else:
    module = dispatch.load(
      "linear_cross_entropy",
      implementation,
      width=hidden.shape[1],
      dtype=hidden.dtype,
    )
    bears = weights != 0
    losses = cast(  # Not what `custom_vjp` says of it.
      Array, _token_losses(module, z_loss, hidden, head, targets, bears)
    )
  return weights * losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_losses(module, z_loss, hidden, head, targets, bears):
  return _forward(module, z_loss, hidden, head, targets, bears)[0]


def _forward(module, z_loss, hidden, head, targets, bears):
  kept = {"bears": bears} if module is xla else {}
  if module is xla and xla.keeps_chances(hidden, head):
    normalizers, logits, kept["chances"] = xla.statistics_and_chances(
      hidden, head, targets, bears
    )
  else:
    normalizers, logits = module.statistics(hidden, head, targets, **kept)
  losses = normalizers - logits + z_loss * jnp.square(normalizers)
  return losses, (hidden, head, targets, normalizers, kept)


def _backward(module, z_loss, residuals, gradients):
  hidden, head, targets, normalizers, kept = residuals
  d_hidden, d_head = module.gradients(
    hidden,
    head,
    targets,
    normalizers=normalizers,
    d_normalizers=gradients * (1 + 2 * z_loss * normalizers),
    d_logits=-gradients,
    **kept,
  )
  return d_hidden, d_head, None, None


_token_losses.defvjp(_forward, _backward)
