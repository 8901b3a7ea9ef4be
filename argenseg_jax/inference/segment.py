"""A batch of prompts to masks and text, as one program; what comes of it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from argenseg_jax.config import EvalConfig
from argenseg_jax.data import transforms
from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.generate import generate
from argenseg_jax.models.argenseg import (
  ARGenSeg,
  normalize_images,
  normalize_seg_masks,
)
from argenseg_jax.models.llm import KVCache
from argenseg_jax.types import Array


class Answers(NamedTuple):
  """What a batch was answered with, on the host or the device."""

  tokens: Array  # int32 [b text]
  num_masks: Array  # int32 [b]
  codes: Array  # int32 [b m n]
  images: Array  # uint8 [b m h w 3], decoded mask images.
  confidences: Array  # float32 [b m]: mean log-probability of a mask's codes.


def answer_batch(
  model: ARGenSeg,
  tokens: Array,
  valid: Array,
  images: Array | None,
  *,
  config: EvalConfig,
  is_answer: Array | None = None,
  vision: Array | None = None,
  prefix: KVCache | None = None,
  num_scales: int | None = None,
  past_seg_masks: Array | None = None,
) -> Answers:
  """Generates and decodes, as one program.

  Args:
    model: the whole model.
    tokens: int32 [b t], left-padded prompts.
    valid: bool [b t].
    images: uint8 [b i h w 3]; None where `vision` or `prefix` hold them, or
      prompts have none.
    config: limits of an answer.
    is_answer: bool [b t], from the first earlier answer or forced word on.
    vision: [1 v d], vision embeddings that all prompts share.
    prefix: what stands before all prompts.
    num_scales: predict and decode only so many scales, the coarsest first.
    past_seg_masks: uint8 [b m h w 1|3], masks of earlier answers.
  """
  past_codes = None
  if past_seg_masks is not None:
    b, m = past_seg_masks.shape[:2]
    flat = normalize_seg_masks(past_seg_masks)
    flat = flat.reshape(b * m, *flat.shape[2:])
    past_codes = model.vqvae.encode(flat).reshape(b, m, -1)
  model.prepare_to_generate()
  if images is not None and images.shape[1]:
    vision = model.vision_embeddings(normalize_images(images))
  elif vision is not None:
    vision = jnp.broadcast_to(vision, (len(tokens), *vision.shape[1:]))
  generated = generate(
    model,
    GenerationOptions(
      max_text=config.max_text,
      max_masks=config.max_masks,
      num_scales=num_scales,
      start_with_mask=config.start_with_mask,
      stop_after_masks=True,
    ),
    tokens=tokens,
    valid=valid,
    vision=vision,
    prefix=prefix,
    is_answer=is_answer,
    past_codes=past_codes,
  )
  b, m, n = generated.codes.shape
  decoded = model.vqvae.decode(generated.codes.reshape(b * m, n), num_scales)
  predicted = sum(model.scales.counts[:num_scales])
  return Answers(
    tokens=generated.tokens,
    num_masks=generated.num_masks,
    codes=generated.codes,
    images=to_uint8(decoded).reshape(b, m, *decoded.shape[1:]),
    confidences=jnp.sum(generated.log_probs, -1) / predicted,
  )


def seg_mask_at_size(
  decoded: np.ndarray, size: tuple[int, int], *, pad_square: bool = False
) -> np.ndarray:
  """bool [h w] of a decoded mask image, as the authors' evaluation forms it."""
  gray = transforms.gray_at_size(decoded, size, pad_square=pad_square)
  return transforms.binary_mask(gray)


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """The answer to one request.

  Attributes:
    seg_masks: bool [m h w] at the image's own size, m masks of the answer.
    text: what the model said, with `<mask>` where it drew a mask.
    confidences: float32 [m], mean log-probability of each mask's codes.
    codes: int32 [m n]; 0 for scales that were left out.
  """

  seg_masks: np.ndarray
  text: str
  confidences: np.ndarray
  codes: np.ndarray
  _draw_strip: Callable[[], np.ndarray] = dataclasses.field(repr=False)
  _pad_square: bool = dataclasses.field(repr=False)

  @property
  def has_mask(self) -> bool:
    """Whether the answer holds a mask."""
    return len(self.seg_masks) > 0

  @functools.cached_property
  def seg_mask(self) -> np.ndarray:
    """bool [h w]: every pixel of any of its masks; empty without a mask."""
    return np.asarray(self.seg_masks.any(0))

  @property
  def confidence(self) -> float:
    """Mean log-probability of all its codes; nan without a mask."""
    return float(np.mean(self.confidences)) if self.has_mask else float("nan")

  @functools.cached_property
  def strip(self) -> np.ndarray:
    """uint8 [scales side side 3]: the first mask's image after each scale,
    black without a mask. Drawn when it is asked for."""
    return self._draw_strip()

  @functools.cached_property
  def scale_masks(self) -> np.ndarray:
    """bool [scales h w]: the first mask after each scale, at the image's own
    size. Drawn when it is asked for."""
    size = self.seg_masks.shape[1:]
    masks = [
      seg_mask_at_size(image, size, pad_square=self._pad_square)
      for image in self.strip
    ]
    return np.stack(masks)

  def as_pil(self) -> Image.Image:
    """The mask as a gray image: 255 inside, 0 outside."""
    return Image.fromarray(self.seg_mask.astype(np.uint8) * np.uint8(255))


def answer_tokens(tokens: np.ndarray) -> np.ndarray:
  """An answer's tokens without the zeros behind its end."""
  used = np.flatnonzero(tokens)
  return tokens[: used[-1] + 1] if used.size else tokens[:0]


def to_uint8(x: Array) -> Array:
  """Images leave the image tokenizer by truncation."""
  return ((x + 1) / 2 * 255).astype(jnp.uint8)
