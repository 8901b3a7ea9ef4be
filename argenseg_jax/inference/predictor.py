"""Answers of a trained model: masks and text for images and requests."""

import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageOps

from argenseg_jax import checkpoint
from argenseg_jax.config import DataConfig, EvalConfig
from argenseg_jax.data import image_codec
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.text import TextTokenizer
from argenseg_jax.inference import prompts
from argenseg_jax.inference.engine import Engine
from argenseg_jax.inference.prompts import Prompt, Turns
from argenseg_jax.inference.segment import Prediction
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import int8

AnyImage = np.ndarray | Image.Image | str | pathlib.Path


class Predictor:
  """Segments images with a checkpoint; threads may share it.

  Programs are compiled once per number of rows and prompt bucket: rows are
  rounded up to powers of two, prompts to multiples of 32.

  Args:
    loaded: a checkpoint of a whole model.
    settings: limits of an answer; those of the run by default. `batch_size` is
      the most rows of a program.
    bfloat16: keep and use weights in bfloat16, but for the quantizer.
  """

  def __init__(
    self,
    loaded: checkpoint.Loaded,
    settings: EvalConfig | None = None,
    *,
    bfloat16: bool = False,
  ):
    self._engine = Engine(loaded, settings, bfloat16=bfloat16)
    self._here = threading.local()  # Each thread's own image.

  @property
  def config(self) -> ModelConfig:
    """The model's sizes and special tokens."""
    return self._engine.config

  @property
  def data(self) -> DataConfig:
    """How the model's images and requests were made."""
    return self._engine.data

  @property
  def settings(self) -> EvalConfig:
    """Limits of an answer."""
    return self._engine.settings

  @property
  def tokenizer(self) -> TextTokenizer:
    return self._engine.tokenizer

  @classmethod
  def from_checkpoint(
    cls,
    path: str | pathlib.Path,
    settings: EvalConfig | None = None,
    *,
    bfloat16: bool = False,
    mesh: Mesh | None = None,
    weights: int8.Weights | None = None,
    adapters: str | pathlib.Path | None = None,
  ) -> "Predictor":
    """Opens a checkpoint; see `checkpoint.load` for what may go wrong.

    Args:
      path: of a work directory or a checkpoint in it.
      settings: see the class.
      bfloat16: likewise.
      mesh: devices that share the work; all along `data` by default.
      weights: see `checkpoint.load`.
      adapters: likewise.
    """
    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    loaded = checkpoint.load(
      path, mesh=mesh, dtype=dtype, weights=weights, adapters=adapters
    )
    return cls(loaded, settings, bfloat16=bfloat16)

  def set_image(self, image: AnyImage) -> "Picture":
    """Looks at an image once, for many requests.

    `segment` and `chat` of this thread are about it from now on; the image
    that is returned may be asked by any thread.

    Raises:
      DataError: not an image.
    """
    self._here.picture = Picture(self._engine, image)
    return self._here.picture

  def segment(
    self, image: AnyImage, request: str | None = None, **options: Any
  ) -> Prediction:
    """One answer: `segment(request)` about the image of `set_image`, or
    `segment(image, request)` about this one.

    Args:
      image: RGB [h w 3] of any size (uint8, or as `image_codec.image_pixels`
        takes it), a PIL image or a file.
      request: what to segment, in the wording of the model's training; the
        request template of its data is put around it.
      **options: see `segment_batch`.
    """
    if request is None:
      if not isinstance(image, str):
        raise DataError(
          "segment(image) needs a request as well: segment(image, request)."
        )
      return self._picture().segment(image, **options)
    (prediction,) = self.segment_batch([image], [request], **options)
    return prediction

  def segment_batch(
    self,
    images: Sequence[AnyImage],
    requests: Sequence[str],
    *,
    answer_prefix: str | None = None,
    num_scales: int | None = None,
    template: str = "",
  ) -> list[Prediction]:
    """One answer for each image and request of the same place.

    Image to mask image is one program. For several requests of one image,
    `set_image` saves work.

    Args:
      images: see `segment`.
      requests: see `segment`.
      answer_prefix: words that the answer begins with, right before its mask:
        no text is generated there. None lets the model speak.
      num_scales: stop after so many scales of a mask; None takes all.
      template: kind of request, of `data.chat.REQUEST_TEMPLATES`; that of the
        model's training where it is "".

    Raises:
      DataError: not an image, or no such number of scales or template.
    """
    if len(images) != len(requests):
      raise DataError(f"{len(requests)} requests for {len(images)} images.")
    prompt = self._engine.prompt
    asked = [prompt(r, answer_prefix, template) for r in requests]
    pixels = [_pixels(image) for image in images]
    predictions = []
    for rows in _chunks(len(asked), self.settings.batch_size):
      shown = pixels[rows]
      predictions += self._engine.ask(
        asked[rows],
        [image.shape[:2] for image in shown],
        images=np.stack([self._engine.resized(image) for image in shown]),
        answer_prefix=answer_prefix,
        num_scales=num_scales,
      )
    return predictions

  def chat(
    self, history: Turns, *, image: AnyImage | None = None, **options: Any
  ) -> Prediction:
    """Continues a conversation, about the image of `set_image` if there is
    one in this thread.

    Args:
      history: {"from": "human" or "gpt", "value": text}, the last from "human";
        `<image>` stands where the image goes, else it comes first. The model
        sees the words of earlier answers, not their masks.
      image: another image.
      **options: `answer_prefix` and `num_scales` as of `segment_batch`, and
        `max_text`: most text tokens of the
        answer.
    """
    if image is not None:
      return Picture(self._engine, image).chat(history, **options)
    picture = getattr(self._here, "picture", None)
    if picture is not None:
      return picture.chat(history, **options)
    prompt = self._engine.turns(history, 0, options.get("answer_prefix"))
    (prediction,) = self._engine.ask([prompt], [(1, 1)], **options)
    return prediction

  def warm_up(
    self,
    *,
    batches: Sequence[int] = (1,),
    longest: int,
    about_one_image: bool = False,
    **options: Any,
  ) -> int:
    """Compiles what requests will need; runs each program once.

    Args:
      batches: numbers of rows.
      longest: words of a request, in tokens.
      about_one_image: the programs after `set_image` instead.
      **options: of the calls to come, see `segment_batch`.

    Returns:
      How many programs ran.
    """
    side = self.data.image_side
    blank = np.zeros((side, side, 3), np.uint8)
    picture = self.set_image(blank) if about_one_image else None
    word = self.tokenizer.encode("a")[:1]
    ran = set()
    for rows in batches:
      for length in range(0, longest + prompts.BUCKET, prompts.BUCKET):
        prompt = self._engine.prompt("", options.get("answer_prefix"))
        at = prompt.image_end
        prompt = prompt._replace(
          ids=np.insert(prompt.ids, at, np.repeat(word, min(length, longest)))
        )
        if picture is not None:
          start, inputs = picture.inputs([prompt])
          prompt = prompt.after(start)
        else:
          inputs = {"images": np.stack([blank[None]] * rows)}
        key = (rows, prompts.bucket(len(prompt.ids)))
        if key not in ran:
          ran.add(key)
          self._engine.ask(
            [prompt] * rows, [(1, 1)] * rows, **inputs, **options
          )
    self._engine.strip(np.zeros(self._engine.num_codes, np.int32))
    return len(ran) + 1

  def _picture(self) -> "Picture":
    picture = getattr(self._here, "picture", None)
    if picture is None:
      raise DataError(
        "no image was set in this thread; call set_image(image) first, or "
        "segment(image, request)."
      )
    return picture


class Picture:
  """An image that a model has seen; made by `Predictor.set_image`.

  All its requests share the vision embeddings. Where the model's prompts are
  plainly causal, they also share the decoder's keys and values up to the end of
  the image, and only what follows is run for each of them.

  Args:
    engine: of the model.
    image: see `Predictor.segment`.
  """

  def __init__(self, engine: Engine, image: AnyImage):
    self._engine = engine
    pixels = _pixels(image)
    self.size: tuple[int, int] = pixels.shape[:2]
    self._vision = engine.see(pixels)
    self._prefix = None
    if engine.shares_prefixes:
      prompt = engine.prompt("", None)
      self._beginning = prompt.ids[: prompt.image_end]
      self._prefix = engine.begin(self._beginning, self._vision)

  def segment(self, request: str, **options: Any) -> Prediction:
    """One answer; see `Predictor.segment_batch` for options."""
    (prediction,) = self.segment_batch([request], **options)
    return prediction

  def segment_batch(
    self,
    requests: Sequence[str],
    *,
    answer_prefix: str | None = None,
    num_scales: int | None = None,
    template: str = "",
  ) -> list[Prediction]:
    """An answer for each request; see `Predictor.segment_batch`."""
    engine = self._engine
    asked = [engine.prompt(r, answer_prefix, template) for r in requests]
    predictions = []
    for rows in _chunks(len(asked), engine.settings.batch_size):
      predictions += self._ask(
        asked[rows], answer_prefix=answer_prefix, num_scales=num_scales
      )
    return predictions

  def chat(self, history: Turns, **options: Any) -> Prediction:
    """Continues a conversation; see `Predictor.chat`."""
    prompt = self._engine.turns(history, 1, options.get("answer_prefix"))
    (prediction,) = self._ask([prompt], **options)
    return prediction

  def inputs(self, asked: Sequence[Prompt]) -> tuple[int, dict[str, Any]]:
    """How many ids of these prompts have been run, and what holds the rest."""
    if self._prefix is not None:
      start = len(self._beginning)
      if all(np.array_equal(p.ids[:start], self._beginning) for p in asked):
        return start, {"prefix": self._prefix}
    return 0, {"vision": self._vision}

  def _ask(self, asked: Sequence[Prompt], **options: Any) -> list[Prediction]:
    start, inputs = self.inputs(asked)
    asked = [prompt.after(start) for prompt in asked]
    sizes = [self.size] * len(asked)
    return self._engine.ask(asked, sizes, **inputs, **options)


def _pixels(image: AnyImage) -> np.ndarray:
  """uint8 RGB [h w 3], as the image's file would give it."""
  if isinstance(image, (str, pathlib.Path)):
    return image_codec.decode_image(pathlib.Path(image))
  if isinstance(image, Image.Image):
    return image_codec.image_pixels(ImageOps.exif_transpose(image))
  return image_codec.image_pixels(np.asarray(image))


def _chunks(count: int, size: int) -> list[slice]:
  return [slice(i, i + size) for i in range(0, count, size)]
