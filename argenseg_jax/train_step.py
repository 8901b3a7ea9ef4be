"""One optimisation step of either task, as pure functions for `jax.jit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from argenseg_jax import losses
from argenseg_jax.config import LossConfig, RunConfig
from argenseg_jax.models.argenseg import (
  ARGenSeg,
  normalize_images,
  normalize_seg_masks,
)
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.tokenizer_training import usage_and_perplexity
from argenseg_jax.types import Batch, ModelInputs

REMAT_POLICIES: dict[str, Callable | bool | None] = {
  "none": False,
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class TrainState(NamedTuple):
  """What a step changes, and `fixed`: variables that do not train."""

  step: Array  # int32 []
  params: nnx.State
  fixed: nnx.State
  optimizer: Any
  usage: Array  # int32 [codes]: since the last revival (image tokenizer only).


def prepare_inputs(
  model: ARGenSeg, batch: Batch, *, drop_key: Array | None, drop_share: float
) -> tuple[ModelInputs, Array, Array]:
  """Runs the image tokenizer and forms the teacher-forced inputs.

  Args:
    model: the whole model.
    batch: bytes and tokens.
    drop_key: None keeps all scale inputs.
    drop_share: share of masks whose scale inputs are zero from a random scale
      on, so that the decoder must look at the picture.

  Returns:
    Inputs, token targets and code indices (see `losses.resolve_targets`).
  """
  b, m = batch.mask_valid.shape
  if batch.codes.shape[2]:
    codes = batch.codes.reshape(b * m, -1)
  else:
    seg_masks = normalize_seg_masks(batch.seg_masks)
    codes = model.vqvae.encode(seg_masks.reshape(b * m, *seg_masks.shape[2:]))
    codes = jax.lax.stop_gradient(codes)
  scale_inputs = model.vqvae.quantizer.scale_inputs(codes)
  scale_inputs = jax.lax.stop_gradient(scale_inputs)
  if drop_key is not None and drop_share > 0:
    chosen, first = jax.random.split(drop_key)
    num_scales = len(model.scales)
    drops = jax.random.bernoulli(chosen, drop_share, (b * m, 1))
    start = jax.random.randint(first, (b * m, 1), 1, num_scales)
    level = jnp.asarray(model.scales.scale_of_code)[None, 1:]
    dropped = drops & (level >= start)
    scale_inputs = jnp.where(dropped[:, :, None], 0.0, scale_inputs)
  targets, code_index = losses.resolve_targets(
    batch.targets, codes.reshape(b, m, -1), model.config.token_ids.first_code
  )
  inputs = ModelInputs(
    tokens=batch.tokens,
    positions=batch.positions,
    segment_ids=batch.segment_ids,
    is_prompt=batch.is_prompt,
    images=normalize_images(batch.images),
    scale_inputs=scale_inputs.reshape(b, m, *scale_inputs.shape[1:]),
  )
  return inputs, targets, code_index


def mllm_loss(
  model: ARGenSeg,
  batch: Batch,
  config: LossConfig,
  *,
  key: Array | None = None,
  remat: str = "none",
) -> tuple[Array, losses.LossSums]:
  """Mean text loss plus mean code loss; `key` turns training noise on."""
  inputs, targets, code_index = prepare_inputs(
    model, batch, drop_key=key, drop_share=config.drop_scale_inputs
  )
  sums = losses.decoder_loss(
    model(inputs, remat_policy=REMAT_POLICIES[remat]),
    model.llm.head,
    targets,
    code_index,
    batch.sample_weight,
    scales=model.scales,
    z_loss=config.z_loss,
  )
  text, code = sums.means()
  if config.code_average == "scale":
    code = jnp.mean(sums.scale_means())
  return text + code, sums


def grounding_gap(model: ARGenSeg, batch: Batch) -> tuple[Array, Array]:
  """Code loss with true images, and with images moved on by one row.

  Their difference is the grounding gap: 0 for a model that does not look.
  """
  config = LossConfig(code_average="token", drop_scale_inputs=0.0, z_loss=0.0)
  shuffled = batch._replace(images=jnp.roll(batch.images, 1, axis=0))
  _, true = mllm_loss(model, batch, config)
  _, wrong = mllm_loss(model, shuffled, config)
  return true.means()[1], wrong.means()[1]


def vqvae_loss(
  model: VQVAE, batch: Batch, *, reconstruction: str, quantize: bool
) -> tuple[Array, dict[str, Array]]:
  """Reconstruction plus quantiser loss over all masks of a batch.

  Args:
    model: the image tokenizer.
    batch: only its seg_masks are used.
    reconstruction: "mse" or "bce_dice".
    quantize: False trains a plain autoencoder (warm start).
  """
  images = normalize_seg_masks(batch.seg_masks)
  images = images.reshape(-1, *images.shape[2:])
  out = model(images, quantize=quantize)
  if reconstruction == "mse":
    fit = jnp.mean((out.images - images) ** 2)
  else:
    fit = losses.seg_mask_loss(out.images, images)
  metrics = {"reconstruction": fit, "vq": out.vq_loss}
  if quantize:
    counts = model.quantizer.count_codes(out.codes)
    metrics["counts"] = counts
    used, perplexity = usage_and_perplexity(counts)
    metrics["codes_used"] = used
    metrics["perplexity"] = perplexity
  return fit + out.vq_loss, metrics


def make_train_step(
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  config: RunConfig,
  task: str,
  *,
  quantize: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """A function (state, batch) -> (state, metrics), to be jitted.

  Args:
    graph: of the module that `task` trains.
    optimizer: from `optimizer.make_optimizer`.
    config: of the run.
    task: "vqvae" or "mllm".
    quantize: False while an image tokenizer warms up without its quantiser.
  """
  remat = config.stage(task).train.remat

  def loss_of(params, fixed, batch, key):
    model = nnx.merge(graph, params, fixed)
    if task == "vqvae":
      loss, metrics = vqvae_loss(
        model,
        batch,
        reconstruction=config.tokenizer_training.reconstruction,
        quantize=quantize,
      )
      return loss, metrics
    loss, sums = mllm_loss(model, batch, config.loss, key=key, remat=remat)
    text, code = sums.means()
    return loss, {
      "text_loss": text,
      "code_loss": code,
      "scale_loss": sums.scale_means(),
    }

  def step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(
      state.params, state.fixed, batch, key
    )
    updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
    usage = state.usage
    if "counts" in metrics:
      usage = usage + jnp.sum(metrics.pop("counts"), 0, dtype=usage.dtype)
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      fixed=state.fixed,
      optimizer=opt_state,
      usage=usage,
    ), metrics

  return step
