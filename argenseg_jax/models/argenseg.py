"""ARGenSeg: vision tower, decoder and image tokenizer tied into one model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from argenseg_jax import construct
from argenseg_jax.kernels import dispatch
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import layers
from argenseg_jax.models.llm import Decoder
from argenseg_jax.models.vit import VisionEncoder
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.types import IMAGENET_MEAN, IMAGENET_STD, ModelInputs


def normalize_images(
  images: UInt8[Array, "*b h w 3"],
) -> Float[Array, "*b h w 3"]:
  """RGB bytes to the vision tower's float32 input."""
  mean = np.asarray(IMAGENET_MEAN, np.float32)
  std = np.asarray(IMAGENET_STD, np.float32)
  return (images.astype(jnp.float32) / 255.0 - mean) / std


def normalize_seg_masks(
  seg_masks: UInt8[Array, "*b h w c"],
) -> Float[Array, "*b h w 3"]:
  """Mask or image bytes to the image tokenizer's input in [-1, 1]."""
  x = seg_masks.astype(jnp.float32) / 255.0 * 2.0 - 1.0
  return jnp.broadcast_to(x, (*x.shape[:-1], 3))


class ARGenSeg(nnx.Module):
  """The whole model; its head predicts words and codes alike.

  Attributes:
    vision: vision tower with connector.
    llm: the decoder.
    vqvae: the image tokenizer (frozen while the decoder trains).
    word_embed: next-scale input -> width of the decoder.
    lvl_embed: [scales d], one row a scale.
    pos_embed: [codes-of-a-mask d], one row a code.
    vision_pos: [vision embeddings d], only with `aligned_positions`.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    self.config = config
    self.scales = config.vqvae.pyramid
    kwargs: dict[str, Any] = dict(
      rngs=rngs, dtype=dtype, param_dtype=param_dtype
    )
    width = config.llm.width
    self.vision = VisionEncoder(config.vision, width, **kwargs)
    self.llm = Decoder(config.llm, **kwargs)
    self.vqvae = VQVAE(config.vqvae, **kwargs)
    aligned = config.aligned_positions
    zeros = layers.zeros_init
    self.word_embed = layers.Linear(
      config.vqvae.latent_channels,
      width,
      axes=("latent", "embed"),
      init=layers.fan_in_init if aligned else zeros,
      **kwargs,
    )
    self.lvl_embed = layers.param(
      rngs, (len(self.scales), width), (None, "embed"), zeros, param_dtype
    )
    self.pos_embed = layers.param(
      rngs,
      (self.scales.num_codes, width),
      (None, "embed"),
      self._slot_positions if aligned else zeros,
      param_dtype,
    )
    self.vision_pos = (
      layers.param(
        rngs,
        (config.vision.num_embeddings, width),
        (None, "embed"),
        self._vision_positions,
        param_dtype,
      )
      if aligned
      else None
    )

  def _slot_positions(self, key, shape, dtype):
    del key
    grid = self.scales.latent_side
    tables = [layers.sincos_2d(s, shape[1], grid) for s in self.scales.sides]
    return jnp.asarray(np.concatenate(tables), dtype)

  def _vision_positions(self, key, shape, dtype):
    del key
    side, grid = self.config.vision.embeddings_side, self.scales.latent_side
    return jnp.asarray(layers.sincos_2d(side, shape[1], grid), dtype)

  def unstack(self) -> None:
    """Takes the layers of tower and decoder apart, see `layers.unstack`."""
    if self.vision.tower.layers is not None:
      self.vision.tower.layers = layers.unstack(self.vision.tower.layers)
    self.llm.layers = layers.unstack(self.llm.layers)

  def prepare_to_generate(self) -> None:
    """Takes the layers apart where passes over a stack would copy its weights.

    Call it before the state becomes a program's input, and inside the program:
    on a GPU a slice of an input is a copy, too. A CPU waits for the program,
    where slices cost nothing.
    """
    traced = isinstance(self.llm.norm.scale[...], Tracer)
    if dispatch.copies_stacks() and (traced or dispatch.copies_slices()):
      self.unstack()

  @property
  def code_head(self) -> Float[Array, "codes d"]:
    """The rows of the head that predict image codes."""
    first = self.config.token_ids.first_code
    return self.llm.head_rows(first, self.config.vqvae.num_codes)

  @jax.named_scope("vision")
  def vision_embeddings(
    self, images: Float[Array, "b i h w 3"], **kwargs
  ) -> Float[Array, "b v d"]:
    """Vision embeddings of all images of a row, one image after another.

    Args:
      images: normalized pixels.
      **kwargs: options of `VisionEncoder` (drop path noise, remat policy).
    """
    b, i = images.shape[:2]
    x = self.vision(images.reshape(b * i, *images.shape[2:]), **kwargs)
    if self.vision_pos is not None:
      x = x + self.vision_pos[...].astype(x.dtype)
    return x.reshape(b, -1, x.shape[-1])

  def slot_embeddings(
    self, scale_inputs: Float[Array, "b n c"], first: int
  ) -> Float[Array, "b n d"]:
    """Decoder inputs of the code slots first..first+n-1 of one mask.

    Slot 0 is `<ge_start>` itself and has no such embedding.
    """
    n = scale_inputs.shape[1]
    x = self.word_embed(scale_inputs)
    level = self.scales.scale_of_code[first : first + n]
    x = x + self.lvl_embed[...][level].astype(x.dtype)
    return x + self.pos_embed[...][first : first + n].astype(x.dtype)

  def prompt_embeddings(
    self, tokens: Int[Array, "b t"], vision: Float[Array, "b v d"]
  ) -> Float[Array, "b t d"]:
    """Word embeddings with `<IMG_CONTEXT>` replaced, in order, by `vision`."""
    x = self.llm.embed(tokens)
    is_image = tokens == self.config.token_ids.img_context
    return _fill(x, is_image, vision.astype(x.dtype))

  def input_embeddings(
    self, inputs: ModelInputs, vision: Float[Array, "b v d"]
  ) -> Float[Array, "b t d"]:
    """Teacher-forced decoder inputs: words, vision embeddings, code slots."""
    x = self.prompt_embeddings(inputs.tokens, vision)
    return self.with_slots(x, inputs.tokens, inputs.scale_inputs)

  def with_slots(
    self,
    x: Float[Array, "b t d"],
    tokens: Int[Array, "b t"],
    scale_inputs: Float[Array, "b m n c"],
  ) -> Float[Array, "b t d"]:
    """Replaces `<MASK_CONTEXT>` by the slots of each row's masks, in order."""
    b, m, n, c = scale_inputs.shape
    flat = scale_inputs.reshape(b * m, n, c)
    slots = self.slot_embeddings(flat, 1).reshape(b, m * n, -1)
    is_slot = tokens == self.config.token_ids.mask_context
    return _fill(x, is_slot, slots.astype(x.dtype))

  def reach(
    self, tokens: Int[Array, "b t"], is_prompt: Bool[Array, "b t"]
  ) -> Int[Array, "b t"] | None:
    """Last visible index of each position, see `attention.attention_mask`; None
    where attention is plainly causal."""
    config = self.config
    if not (config.bidirectional_prompt or config.full_attention_in_scale):
      return None
    b, t = tokens.shape
    index = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    reach = index
    if self.config.bidirectional_prompt:
      answer = jnp.where(is_prompt, t, index)
      end = jax.lax.cummin(answer, axis=1, reverse=True) - 1
      reach = jnp.where(is_prompt, end, reach)
    if self.config.full_attention_in_scale:
      is_slot = tokens == self.config.token_ids.mask_context
      slots_per_mask = self.scales.num_codes - 1
      code = (jnp.cumsum(is_slot, axis=1) - 1) % slots_per_mask + 1
      level = self.scales.scale_of_code
      ends = np.add(self.scales.offsets, self.scales.counts)[level] - 1
      left = jnp.asarray(ends - np.arange(self.scales.num_codes), jnp.int32)
      reach = jnp.where(is_slot, index + left[code], reach)
    return reach

  def __call__(
    self,
    inputs: ModelInputs,
    *,
    rope_length: int | None = None,
    remat_policy: Callable | bool | None = False,
    drop_path: Float[Array, "bi l 2"] | None = None,
  ) -> Float[Array, "b t d"]:
    """Hidden states before the head, for teacher-forced inputs."""
    vision = self.vision_embeddings(
      inputs.images, remat_policy=remat_policy, drop_path=drop_path
    )
    hidden, _ = self.llm(
      self.input_embeddings(inputs, vision),
      positions=inputs.positions,
      segment_ids=inputs.segment_ids,
      reach=self.reach(inputs.tokens, inputs.is_prompt),
      rope_length=rope_length,
      remat_policy=remat_policy,
    )
    return hidden


def _fill(
  x: Float[Array, "b t d"],
  where: Bool[Array, "b t"],
  values: Float[Array, "b n d"],
) -> Float[Array, "b t d"]:
  """Puts the rows of `values` in order into the places marked by `where`."""
  if values.shape[1] == 0:
    return x
  order = jnp.clip(jnp.cumsum(where, axis=1) - 1, 0, values.shape[1] - 1)
  picked = jnp.take_along_axis(values, order[:, :, None], axis=1)
  return jnp.where(where[:, :, None], picked, x)
