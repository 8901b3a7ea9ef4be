"""Losses of the decoder and of the image tokenizer, as sums and counts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels.dispatch import Implementation
from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.scales import Scales
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET


class TargetCounts(NamedTuple):
  """Weights of all targets, by kind."""

  text: Array  # []
  code: Array  # [scales]


class LossSums(NamedTuple):
  """Cross-entropy sums in nats and how many targets they hold."""

  text: Array  # []
  text_count: Array  # []
  code: Array  # [scales]
  code_count: Array  # [scales]

  def means(self, whole: TargetCounts | None = None) -> tuple[Array, Array]:
    """Mean text and code loss over targets; 0 where there are none.

    Args:
      whole: counts of the batch that these sums are a part of; the means of
        its parts add up to its own. None: these sums are the whole.
    """
    text_count, code_count = whole or (self.text_count, self.code_count)
    return (
      self.text / jnp.maximum(text_count, 1),
      jnp.sum(self.code) / jnp.maximum(jnp.sum(code_count), 1),
    )

  def scale_means(self, whole: TargetCounts | None = None) -> Array:
    """Mean code loss of each scale; `whole` as in `means`."""
    return self.code / jnp.maximum(whole.code if whole else self.code_count, 1)


def count_targets(
  targets: Int[Array, "b t"],
  code_index: Int[Array, "b t"],
  sample_weight: Float[Array, "b"],
  scales: Scales,
) -> TargetCounts:
  """Weights of text and code targets.

  Args:
    targets: token ids; `IGNORE_TARGET` bears no loss.
    code_index: from `code_indices`.
    sample_weight: weight of each row.
    scales: which scale a code belongs to.
  """
  weights = jnp.where(targets == IGNORE_TARGET, 0.0, sample_weight[:, None])
  return TargetCounts(
    text=jnp.sum(jnp.where(code_index >= 0, 0.0, weights)),
    code=jnp.einsum("bt,btk->k", weights, _scale_of(code_index, scales)),
  )


def _scale_of(code_index: Array, scales: Scales) -> Array:
  """One-hot scale of each position; zeros where the target is no code."""
  level = jnp.asarray(scales.scale_of_code)[jnp.maximum(code_index, 0)]
  return jax.nn.one_hot(
    jnp.where(code_index >= 0, level, -1), len(scales), dtype=jnp.float32
  )


def code_indices(
  targets: Int[Array, "b t"], codes_per_mask: int
) -> Int[Array, "b t"]:
  """Each position's code index within its mask, -1 where none is predicted."""
  is_code = targets == CODE_TARGET
  order = jnp.cumsum(is_code, axis=1) - 1
  return jnp.where(is_code, order % codes_per_mask, -1)


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
  return resolved, code_indices(targets, n)


@jax.named_scope("loss")
def decoder_loss(
  hidden: Float[Array, "b t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "b t"],
  code_index: Int[Array, "b t"],
  sample_weight: Float[Array, "b"],
  *,
  scales: Scales,
  z_loss: float = 0.0,
  implementation: Implementation | None = None,
) -> LossSums:
  """Cross entropy over the full vocabulary, text and code targets apart.

  Args:
    hidden: the decoder's output.
    head: output matrix.
    targets: from `resolve_targets`; `IGNORE_TARGET` bears no loss.
    code_index: from `resolve_targets`.
    sample_weight: weight of each row.
    scales: which scale a code belongs to.
    z_loss: weight of the squared log-normalizer.
    implementation: see `dispatch.load`.
  """
  b, t, d = hidden.shape
  weights = jnp.where(targets == IGNORE_TARGET, 0.0, sample_weight[:, None])
  per_token = linear_cross_entropy(
    hidden.reshape(b * t, d),
    head.astype(hidden.dtype),
    targets.reshape(-1),
    weights.reshape(-1),
    z_loss=z_loss,
    implementation=implementation,
  ).reshape(b, t)
  counts = count_targets(targets, code_index, sample_weight, scales)
  return LossSums(
    text=jnp.sum(jnp.where(code_index >= 0, 0.0, per_token)),
    text_count=counts.text,
    code=jnp.einsum("bt,btk->k", per_token, _scale_of(code_index, scales)),
    code_count=counts.code,
  )


@jax.named_scope("loss")
def seg_mask_loss(
  reconstruction: Float[Array, "b h w c"], target: Float[Array, "b h w c"]
) -> Float[Array, "b"]:
  """Ten times binary cross entropy plus 0.3 soft dice, on images in [-1, 1].

  The reconstruction x stands for the probability sigmoid(4 x): it saturates
  where the image is white or black, and its threshold 0.5 is x = 0.
  """
  logits = 4.0 * reconstruction.astype(jnp.float32)
  truth = (target.astype(jnp.float32) + 1.0) / 2.0
  axes = (1, 2, 3)
  bce = jnp.mean(
    jnp.maximum(logits, 0)
    - logits * truth
    + jnp.log1p(jnp.exp(-jnp.abs(logits))),
    axes,
  )
  chance = jax.nn.sigmoid(logits)
  overlap = 2.0 * jnp.sum(chance * truth, axes) + 1.0
  total = jnp.sum(chance, axes) + jnp.sum(truth, axes) + 1.0
  return 10.0 * (bce + 0.3 * (1.0 - overlap / total))
