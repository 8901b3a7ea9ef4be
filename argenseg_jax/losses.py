"""Losses of the decoder and of the image tokenizer, as sums and counts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.scales import Scales
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET


class LossSums(NamedTuple):
  """Cross-entropy sums in nats and how many targets they hold."""

  text: Array  # []
  text_count: Array  # []
  code: Array  # [scales]
  code_count: Array  # [scales]

  def means(self) -> tuple[Array, Array]:
    """Mean text and code loss over targets; 0 where there are none."""
    return (
      self.text / jnp.maximum(self.text_count, 1),
      jnp.sum(self.code) / jnp.maximum(jnp.sum(self.code_count), 1),
    )

  def scale_means(self) -> Array:
    """Mean code loss of each scale."""
    return self.code / jnp.maximum(self.code_count, 1)


def resolve_targets(
  targets: Int[Array, "b t"], codes: Int[Array, "b m n"], first_code: int
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
  """Puts the image tokenizer's codes into the targets.

  Args:
    targets: token ids, `IGNORE_TARGET` and `CODE_TARGET`.
    codes: the codes of each row's masks, in order.
    first_code: token id of code 0.

  Returns:
    Token ids to predict, and each position's code index within its mask (-1
    where the target is no code).
  """
  b, m, n = codes.shape
  is_code = targets == CODE_TARGET
  order = jnp.cumsum(is_code, axis=1) - 1
  flat = jnp.take_along_axis(
    codes.reshape(b, m * n), jnp.clip(order, 0, m * n - 1), axis=1
  )
  resolved = jnp.where(is_code, first_code + flat, targets)
  return resolved, jnp.where(is_code, order % n, -1)


def decoder_loss(
  hidden: Float[Array, "b t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "b t"],
  code_index: Int[Array, "b t"],
  sample_weight: Float[Array, "b"],
  *,
  scales: Scales,
  z_loss: float = 0.0,
) -> LossSums:
  """Cross entropy over the full vocabulary, text and code targets apart.

  Args:
    hidden: the decoder's output.
    head: output matrix.
    targets: from `resolve_targets`; `IGNORE_TARGET` bears no loss.
    code_index: from `resolve_targets`.
    sample_weight: weight of each row.
    scales: which scale a code belongs to.
    z_loss: weight of the squared log-normaliser.
  """
  b, t, d = hidden.shape
  weights = jnp.where(targets == IGNORE_TARGET, 0.0, sample_weight[:, None])
  per_token = linear_cross_entropy(
    hidden.reshape(b * t, d),
    head.astype(hidden.dtype),
    targets.reshape(-1),
    weights.reshape(-1),
    z_loss=z_loss,
  ).reshape(b, t)
  level = jnp.asarray(scales.scale_of_code)[jnp.maximum(code_index, 0)]
  one_hot = jax.nn.one_hot(
    jnp.where(code_index >= 0, level, -1), len(scales), dtype=jnp.float32
  )
  text_weights = jnp.where(code_index >= 0, 0.0, weights)
  return LossSums(
    text=jnp.sum(jnp.where(code_index >= 0, 0.0, per_token)),
    text_count=jnp.sum(text_weights),
    code=jnp.einsum("bt,btk->k", per_token, one_hot),
    code_count=jnp.einsum("bt,btk->k", weights, one_hot),
  )


def seg_mask_loss(
  reconstruction: Float[Array, "b h w c"], target: Float[Array, "b h w c"]
) -> Float[Array, ""]:
  """Ten times binary cross entropy plus 0.3 soft dice, on images in [-1, 1].

  The reconstruction x stands for the probability sigmoid(4 x): it saturates
  where the image is white or black, and its threshold 0.5 is x = 0.
  """
  logits = 4.0 * reconstruction.astype(jnp.float32)
  truth = (target.astype(jnp.float32) + 1.0) / 2.0
  bce = jnp.mean(
    jnp.maximum(logits, 0)
    - logits * truth
    + jnp.log1p(jnp.exp(-jnp.abs(logits)))
  )
  chance = jax.nn.sigmoid(logits)
  axes = (1, 2, 3)
  overlap = 2.0 * jnp.sum(chance * truth, axes) + 1.0
  total = jnp.sum(chance, axes) + jnp.sum(truth, axes) + 1.0
  return 10.0 * (bce + 0.3 * jnp.mean(1.0 - overlap / total))
