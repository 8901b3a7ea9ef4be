"""What the decoder is fed in training: true codes, one scale ahead."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from argenseg_jax.config import LossConfig
from argenseg_jax.models import losses
from argenseg_jax.models.argenseg import (
  ARGenSeg,
  normalize_images,
  normalize_seg_masks,
)
from argenseg_jax.types import Batch, ModelInputs


class Noise(NamedTuple):
  """Random numbers of a step, drawn for the whole batch: they do not depend on
  how it is split. None where a kind is off."""

  first_dropped: Array | None = (
    None  # int32 [b m]: scale inputs zero from here.
  )
  drop_path: Array | None = None  # float32 [b i l 2], see `VisionTower`.


def draw_noise(
  model: ARGenSeg, batch: Batch, config: LossConfig, key: Array
) -> Noise:
  """Training noise of a batch.

  Args:
    model: the whole model.
    batch: the whole batch.
    config: `drop_scale_inputs` is the share of masks whose scale inputs are
      zero from a random scale on, so that the decoder must look at the image.
    key: of the step.
  """
  b, m = batch.mask_valid.shape
  first_dropped = drop_path = None
  if config.drop_scale_inputs > 0:
    chosen, first = jax.random.split(key)
    num_scales = len(model.scales)
    drops = jax.random.bernoulli(chosen, config.drop_scale_inputs, (b * m, 1))
    start = jax.random.randint(first, (b * m, 1), 1, num_scales)
    first_dropped = jnp.where(drops, start, num_scales).reshape(b, m)
  vision = model.config.vision
  if vision.drop_path > 0:
    shape = (b, batch.images.shape[1], vision.num_layers, 2)
    drop_path = jax.random.uniform(jax.random.fold_in(key, 2), shape)
  return Noise(first_dropped, drop_path)


def prepare_inputs(
  model: ARGenSeg, batch: Batch, noise: Noise
) -> tuple[ModelInputs, Array, Array]:
  """Runs the image tokenizer and forms the teacher-forced inputs.

  Args:
    model: the whole model.
    batch: bytes and tokens.
    noise: which scale inputs are dropped.

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
  if noise.first_dropped is not None:
    level = jnp.asarray(model.scales.scale_of_code)[None, 1:]
    dropped = level >= noise.first_dropped.reshape(b * m, 1)
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
