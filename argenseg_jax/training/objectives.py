"""What each task minimizes, and the numbers that it logs.

Losses are sums over the parts of a batch, each divided by counts of the whole
batch (see `training/step`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from argenseg_jax.config import LossConfig, RunConfig
from argenseg_jax.models import losses
from argenseg_jax.models.argenseg import ARGenSeg, normalize_seg_masks
from argenseg_jax.models.remat import POLICIES
from argenseg_jax.models.teacher_forcing import (
  Noise,
  draw_noise,
  prepare_inputs,
)
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.training.codebook import usage_and_perplexity
from argenseg_jax.types import Batch


def mllm_loss(
  model: ARGenSeg,
  batch: Batch,
  config: LossConfig,
  *,
  noise: Noise | None = None,
  remat: str = "none",
  counts: losses.TargetCounts | None = None,
) -> tuple[Float[Array, ""], losses.LossSums]:
  """Mean text loss plus mean code loss.

  Args:
    model: the whole model.
    batch: a batch, or a part of one.
    config: how codes are averaged.
    noise: of training; of this part.
    remat: key of `models.remat.POLICIES`.
    counts: of the whole batch, if `batch` is a part of one.
  """
  noise = noise or Noise()
  inputs, targets, code_index = prepare_inputs(model, batch, noise)
  drop_path = noise.drop_path
  if drop_path is not None:
    drop_path = drop_path.reshape(-1, *drop_path.shape[2:])
  policy = POLICIES[remat].policy
  hidden = model(inputs, remat_policy=policy, drop_path=drop_path)
  chosen = config.implementation
  sums = losses.decoder_loss(
    hidden,
    model.llm.head,
    targets,
    code_index,
    batch.sample_weight,
    scales=model.scales,
    z_loss=config.z_loss,
    implementation=None if chosen == "auto" else chosen,
  )
  return mllm_objective(sums, config, counts), sums


def mllm_objective(
  sums: losses.LossSums,
  config: LossConfig,
  counts: losses.TargetCounts | None = None,
) -> Float[Array, ""]:
  """What training minimizes, or the share of a part in it (see `mllm_loss`)."""
  text, code = sums.means(counts)
  if config.code_average == "scale":
    code = jnp.mean(sums.scale_means(counts))
  return text + code


def mllm_shared(
  model: ARGenSeg, batch: Batch, config: RunConfig, key: Array
) -> tuple[Noise, losses.TargetCounts]:
  """Noise of a whole batch, by row, and the counts that its parts share."""
  noise = draw_noise(model, batch, config.loss, key)
  counts = losses.count_targets(
    batch.targets,
    losses.code_indices(batch.targets, model.scales.num_codes),
    batch.sample_weight,
    model.scales,
  )
  return noise, counts


def mllm_part(
  model: ARGenSeg,
  batch: Batch,
  config: RunConfig,
  *,
  noise: Noise,
  counts: losses.TargetCounts,
  warm: bool,
) -> tuple[Float[Array, ""], losses.LossSums]:
  """A part's share of the decoder's loss (`tasks.Task.loss`)."""
  del warm
  return mllm_loss(
    model,
    batch,
    config.loss,
    noise=noise,
    remat=config.mllm.train.remat,
    counts=counts,
  )


def mllm_metrics(
  sums: losses.LossSums,
  usage: Int[Array, "codes"],
  config: RunConfig,
  *,
  warm: bool,
) -> tuple[dict[str, Array], Int[Array, "codes"]]:
  """What the decoder logs of a step (`tasks.Task.metrics`)."""
  del warm
  text, code = sums.means()
  metrics = {
    "loss": mllm_objective(sums, config.loss),
    "text_loss": text,
    "code_loss": code,
    "scale_loss": sums.scale_means(),
  }
  return metrics, usage


def vqvae_loss(
  model: VQVAE,
  batch: Batch,
  *,
  reconstruction: str,
  quantize: bool,
  count: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Reconstruction plus quantizer loss, means over the masks of a batch.

  Args:
    model: the image tokenizer.
    batch: its seg_masks are used, where they are valid.
    reconstruction: "mse" or "bce_dice".
    quantize: False trains a plain autoencoder (warm start).
    count: masks of the whole batch, if `batch` is a part of one.
  """
  images = normalize_seg_masks(batch.seg_masks)
  images = images.reshape(-1, *images.shape[2:])
  valid = batch.mask_valid.reshape(-1)
  out = model(images, quantize=quantize)
  if reconstruction == "mse":
    fit = jnp.mean((out.images - images) ** 2, (1, 2, 3))
  else:
    fit = losses.seg_mask_loss(out.images, images)
  count = jnp.sum(valid) if count is None else count
  count = jnp.maximum(count, 1).astype(jnp.float32)
  metrics = {
    name: jnp.sum(jnp.where(valid, values, 0)) / count
    for name, values in (("reconstruction", fit), ("vq", out.vq_loss))
  }
  loss = metrics["reconstruction"] + metrics["vq"]
  if out.codes is not None:
    metrics["counts"] = model.quantizer.count_codes(out.codes, valid)
  return loss, metrics


def vqvae_shared(
  model: VQVAE, batch: Batch, config: RunConfig, key: Array
) -> tuple[Noise, Int[Array, ""]]:
  """No noise, and the number of masks of a whole batch."""
  del model, config, key
  return Noise(), jnp.sum(batch.mask_valid)


def vqvae_part(
  model: VQVAE,
  batch: Batch,
  config: RunConfig,
  *,
  noise: Noise,
  counts: Int[Array, ""],
  warm: bool,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """A part's share of the image tokenizer's loss (`tasks.Task.loss`)."""
  del noise
  return vqvae_loss(
    model,
    batch,
    reconstruction=config.tokenizer_training.reconstruction,
    quantize=not warm,
    count=counts,
  )


def vqvae_metrics(
  sums: dict[str, Array],
  usage: Int[Array, "codes"],
  config: RunConfig,
  *,
  warm: bool,
) -> tuple[dict[str, Array], Int[Array, "codes"]]:
  """What the image tokenizer logs of a step (`tasks.Task.metrics`)."""
  del config
  metrics = {"loss": sums["reconstruction"] + sums["vq"]}
  metrics |= {k: v for k, v in sums.items() if k != "counts"}
  if not warm:
    usage = usage + jnp.sum(sums["counts"], 0, dtype=usage.dtype)
    used, perplexity = usage_and_perplexity(sums["counts"])
    metrics |= {"codes_used": used, "perplexity": perplexity}
  return metrics, usage
