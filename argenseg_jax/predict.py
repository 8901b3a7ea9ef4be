"""Answers of a trained model: masks and text for pictures and requests."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import checkpoint
from argenseg_jax import config as config_lib
from argenseg_jax.config import DataConfig, EvalConfig
from argenseg_jax.data import text, transforms
from argenseg_jax.kernels import dispatch
from argenseg_jax.models import quantized
from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
from argenseg_jax.sampling import generate
from argenseg_jax.types import Array

_PROMPT_BUCKET = 32  # Prompt lengths are padded to multiples of this.


class Answers(NamedTuple):
  """What a batch was answered with, on the host or the device."""

  tokens: Array  # int32 [b text]
  num_masks: Array  # int32 [b]
  codes: Array  # int32 [b m n]
  images: Array  # uint8 [b m h w 3], decoded mask images.


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The answer to one request.

  Attributes:
    seg_mask: bool [h w] at the picture's own size; empty without a mask.
    text: what the model said; `<ge_end>` stands where it drew a mask.
    has_mask: whether the answer holds a mask.
    strip: uint8 [scales side side 3], the mask image after each scale.
  """

  seg_mask: np.ndarray
  text: str
  has_mask: bool
  strip: np.ndarray


def answer_batch(
  model: ARGenSeg,
  tokens: Array,
  valid: Array,
  images: Array,
  *,
  config: EvalConfig,
) -> Answers:
  """Generates and decodes, as one program.

  Args:
    model: the whole model.
    tokens: int32 [b t], left-padded prompts.
    valid: bool [b t].
    images: uint8 [b i h w 3].
    config: limits of an answer.
  """
  if dispatch.target().platform == "cpu":
    model.unstack()
  generated = generate(
    model,
    tokens=tokens,
    valid=valid,
    vision=model.vision_embeddings(normalize_images(images)),
    max_text=config.max_text,
    max_masks=config.max_masks,
    start_with_mask=config.start_with_mask,
    stop_after_masks=True,
  )
  b, m, n = generated.codes.shape
  decoded = model.vqvae.decode(generated.codes.reshape(b * m, n))
  return Answers(
    tokens=generated.tokens,
    num_masks=generated.num_masks,
    codes=generated.codes,
    images=to_uint8(decoded).reshape(b, m, *decoded.shape[1:]),
  )


def left_pad(
  prompts: Sequence[np.ndarray], pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as int32 [b t] and bool [b t], t in buckets."""
  longest = max(map(len, prompts))
  length = -(-longest // _PROMPT_BUCKET) * _PROMPT_BUCKET
  tokens = np.full((len(prompts), length), pad, np.int32)
  valid = np.zeros((len(prompts), length), bool)
  for i, prompt in enumerate(prompts):
    tokens[i, length - len(prompt) :] = prompt
    valid[i, length - len(prompt) :] = True
  return tokens, valid


def seg_mask_at_size(
  decoded: np.ndarray, size: tuple[int, int], *, pad_square: bool = False
) -> np.ndarray:
  """bool [h w] of a decoded mask image, as the authors' evaluation forms it."""
  grey = transforms.grey_at_size(decoded, size, pad_square=pad_square)
  return transforms.binary_mask(grey)


class Predictor:
  """Segments pictures with a checkpoint; compiled once per prompt bucket.

  Args:
    loaded: a checkpoint of a whole model.
    settings: limits of an answer; those of the run by default.
  """

  def __init__(
    self, loaded: checkpoint.Loaded, settings: EvalConfig | None = None
  ):
    if not isinstance(loaded.model, ARGenSeg):
      raise checkpoint.CheckpointError(
        f"checkpoint {loaded.path} holds an image tokenizer only; give one of "
        "a whole model."
      )
    self.config = loaded.config
    self.data = config_lib.from_mapping(DataConfig, loaded.meta["run"]["data"])
    stored = config_lib.from_mapping(EvalConfig, loaded.meta["run"]["eval"])
    self.settings = settings or stored
    self.tokenizer = checkpoint.text_tokenizer(loaded)
    graph, self._state = nnx.split(loaded.model)

    @functools.partial(jax.jit, static_argnames="config")
    def answer(state, tokens, valid, images, config):
      model = nnx.merge(graph, state)
      return answer_batch(model, tokens, valid, images, config=config)

    @jax.jit
    def strips(state, codes):
      prefixes = nnx.merge(graph, state).vqvae.decode_prefixes(codes)
      return to_uint8(prefixes)

    self._answer = answer
    self._strips = strips

  @classmethod
  def from_checkpoint(
    cls,
    path: str | pathlib.Path,
    settings: EvalConfig | None = None,
    *,
    weights: quantized.Weights | None = None,
  ) -> "Predictor":
    """Opens a checkpoint; see `checkpoint.load` for what may go wrong, and for
    `weights`."""
    return cls(checkpoint.load(path, weights=weights), settings)

  def segment(self, image: np.ndarray, request: str) -> Prediction:
    """One mask for one picture.

    Args:
      image: uint8 RGB [h w 3], any size.
      request: what to segment, in the wording of the model's training; the
        request template of its data is put around it.
    """
    (prediction,) = self.segment_batch([image], [request])
    return prediction

  def segment_batch(
    self, images: Sequence[np.ndarray], requests: Sequence[str]
  ) -> list[Prediction]:
    """One mask for each picture and request of the same place."""
    prompts = [self._prompt(request) for request in requests]
    tokens, valid = left_pad(prompts, self.config.token_ids.pad)
    resized = [
      transforms.resize_image(
        image,
        self.data.image_side,
        backend=self.data.resize,
        pad_square=self.data.pad_square,
      )
      for image in images
    ]
    pixels = np.stack(resized)[:, None]
    answers = jax.device_get(
      self._answer(self._state, tokens, valid, pixels, self.settings)
    )
    strips = jax.device_get(self._strips(self._state, answers.codes[:, 0]))
    predictions = []
    for i, image in enumerate(images):
      size = image.shape[:2]
      has_mask = bool(answers.num_masks[i])
      seg_mask = np.zeros(size, bool)
      if has_mask:
        seg_mask = seg_mask_at_size(
          answers.images[i, 0], size, pad_square=self.data.pad_square
        )
      predictions.append(
        Prediction(
          seg_mask=seg_mask,
          text=self.tokenizer.decode(
            answer_tokens(answers.tokens[i]), keep_special=True
          ),
          has_mask=has_mask,
          strip=strips[i],
        )
      )
    return predictions

  def _prompt(self, request: str) -> np.ndarray:
    asked = text.request_text(self.data.request, [request], self.data.join)
    prompt = text.chat_prompt(
      [{"from": "human", "value": asked}],
      image_tokens=(self.config.vision.num_embeddings,),
      system_message=self.data.system_message,
    )
    return text.encode_prompt(self.tokenizer, prompt)


def answer_tokens(tokens: np.ndarray) -> np.ndarray:
  """An answer's tokens without the zeros behind its end."""
  used = np.flatnonzero(tokens)
  return tokens[: used[-1] + 1] if used.size else tokens[:0]


def to_uint8(x: Array) -> Array:
  """Pictures leave the image tokenizer by truncation."""
  return ((x + 1) / 2 * 255).astype(jnp.uint8)
