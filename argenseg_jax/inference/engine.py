"""The compiled programs of one model, and the way from prompts to answers."""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import checkpoint, config_parsing, sharding
from argenseg_jax.config import DataConfig, EvalConfig
from argenseg_jax.data import transforms
from argenseg_jax.data.errors import DataError
from argenseg_jax.inference import prompts
from argenseg_jax.inference.generate import prefill_prefix
from argenseg_jax.inference.prompts import Prompt, Turns
from argenseg_jax.inference.segment import (
  Answers,
  Prediction,
  answer_batch,
  answer_tokens,
  seg_mask_at_size,
  to_uint8,
)
from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
from argenseg_jax.models.llm import KVCache
from argenseg_jax.types import Array


class Engine:
  """What `Predictor` and `Picture` share; any thread may use it.

  Args:
    loaded, settings, bfloat16: see `predict.Predictor`.
  """

  def __init__(
    self,
    loaded: checkpoint.Loaded,
    settings: EvalConfig | None,
    *,
    bfloat16: bool,
  ):
    if not isinstance(loaded.model, ARGenSeg):
      raise checkpoint.CheckpointError(
        f"checkpoint {loaded.path} contains an image tokenizer only; give one "
        "of a whole model."
      )
    self.config = loaded.config
    run = loaded.meta["run"]
    self.data = config_parsing.from_mapping(DataConfig, run["data"])
    stored = config_parsing.from_mapping(EvalConfig, run["eval"])
    self.settings = settings or stored
    self.num_codes = self.config.vqvae.codes_per_mask
    self.tokenizer = checkpoint.text_tokenizer(loaded)
    self.shares_prefixes = not loaded.config.bidirectional_prompt
    loaded.model.prepare_to_generate()
    graph, state = nnx.split(loaded.model)
    self._state = _in_bfloat16(state) if bfloat16 else state
    # Two threads never compile the same program.
    self._dispatching = threading.Lock()

    @functools.partial(sharding.jit, static_argnames=("config", "num_scales"))
    def answer(state, padded, images, vision, prefix, *, config, num_scales):
      return answer_batch(
        nnx.merge(graph, state),
        padded.tokens,
        padded.valid,
        images,
        config=config,
        is_answer=padded.is_answer,
        vision=vision,
        prefix=prefix,
        num_scales=num_scales,
      )

    @sharding.jit
    def see(state, images):
      model = nnx.merge(graph, state)
      return model.vision_embeddings(normalize_images(images))

    @sharding.jit
    def begin(state, tokens, vision):
      model = nnx.merge(graph, state)
      model.prepare_to_generate()
      return prefill_prefix(model, tokens, vision)

    @sharding.jit
    def strips(state, codes):
      prefixes = nnx.merge(graph, state).vqvae.decode_prefixes(codes)
      return to_uint8(prefixes)

    self._answer = answer
    self._see = see
    self._begin = begin
    self._strips = strips

  def see(self, pixels: np.ndarray) -> Array:
    """Vision embeddings [1 v d] of an image."""
    return self._run(self._see, self.resized(pixels)[None])

  def begin(self, tokens: np.ndarray, vision: Array) -> KVCache:
    """What prompts that begin with `tokens`, int32 [t], share."""
    return self._run(self._begin, tokens[None], vision)

  def strip(self, codes: np.ndarray) -> np.ndarray:
    """uint8 [scales side side 3] of a mask's codes, int32 [n]."""
    return jax.device_get(self._run(self._strips, codes[None]))[0]

  def prompt(
    self, request: str, answer_prefix: str | None, template: str = ""
  ) -> Prompt:
    """See `prompts.of_request`; the request is about one image."""
    return self._fitting(
      prompts.of_request(
        self.tokenizer,
        self.data,
        request,
        image_tokens=(self.config.vision.num_embeddings,),
        answer_prefix=answer_prefix or "",
        template=template,
      )
    )

  def turns(
    self, history: Turns, num_images: int, answer_prefix: str | None
  ) -> Prompt:
    """See `prompts.of_turns`."""
    return self._fitting(
      prompts.of_turns(
        self.tokenizer,
        self.data,
        history,
        image_tokens=(self.config.vision.num_embeddings,) * num_images,
        answer_prefix=answer_prefix or "",
      )
    )

  def _fitting(self, prompt: Prompt) -> Prompt:
    """The prompt, if the model has positions for it and an answer.

    Raises:
      DataError: it has not.
    """
    answer = self.settings.max_text + (
      self.settings.max_masks * self.config.vqvae.codes_per_mask
    )
    room = self.config.llm.max_positions - answer
    if len(prompt.ids) > room:
      raise DataError(
        f"a request of {len(prompt.ids)} tokens, with its image and forced "
        f"words, is too long: the model has {room} positions before an answer."
      )
    return prompt

  def resized(self, pixels: np.ndarray) -> np.ndarray:
    """uint8 [1 side side 3]: one image of a row."""
    resized = transforms.resize_image(
      pixels,
      self.data.image_side,
      backend=self.data.resize,
      pad_square=self.data.pad_square,
    )
    return resized[None]

  def _run(self, program, *inputs, **static) -> Any:
    """A program's result, on the device."""
    with self._dispatching:
      return program(self._state, *inputs, **static)

  def ask(
    self,
    asked: Sequence[Prompt],
    sizes: Sequence[tuple[int, int]],
    *,
    images: np.ndarray | None = None,
    vision: Array | None = None,
    prefix: KVCache | None = None,
    answer_prefix: str | None = None,
    num_scales: int | None = None,
    max_text: int | None = None,
  ) -> list[Prediction]:
    """Answers at most `settings.batch_size` prompts."""
    settings = self.settings
    if answer_prefix is not None:
      settings = dataclasses.replace(settings, start_with_mask=True)
    if max_text is not None:
      settings = dataclasses.replace(settings, max_text=max_text)
    most = len(self.config.vqvae.scales)
    if num_scales is not None:
      if not 1 <= num_scales <= most:
        raise DataError(f"num_scales is {num_scales}; take 1 to {most}.")
      if num_scales == most:
        num_scales = None
      else:  # Such a mask ends its answer.
        settings = dataclasses.replace(settings, max_masks=1)
    rows = _row_bucket(len(asked), settings.batch_size)
    extra = rows - len(asked)
    padded = prompts.pad(
      [*asked, *list(asked[-1:]) * extra], self.config.token_ids.pad
    )
    if images is not None:
      images = np.concatenate((images, *[images[-1:]] * extra))
    padded, images = sharding.put_like((padded, images), self._state)
    answers = self._run(
      self._answer,
      padded,
      images,
      vision,
      prefix,
      config=settings,
      num_scales=num_scales,
    )
    answers = jax.device_get(answers)
    return [
      self._prediction(
        Answers(*(part[i] for part in answers)),
        size,
        said=answer_prefix or "",
        num_scales=num_scales,
      )
      for i, size in enumerate(sizes)
    ]

  def _prediction(self, answer: Answers, size, *, said, num_scales):
    pad_square = self.data.pad_square
    count = int(answer.num_masks)
    masks = [
      seg_mask_at_size(image, size, pad_square=pad_square)
      for image in answer.images[:count]
    ]

    def draw_strip():
      scales = num_scales or len(self.config.vqvae.scales)
      if not count:
        side = self.config.vqvae.image_side
        return np.zeros((scales, side, side, 3), np.uint8)
      return self.strip(answer.codes[0])[:scales]

    return Prediction(
      seg_masks=np.stack(masks) if masks else np.zeros((0, *size), bool),
      text=said + self._words(answer.tokens),
      confidences=answer.confidences[:count],
      codes=answer.codes[:count],
      _draw_strip=draw_strip,
      _pad_square=pad_square,
    )

  def _words(self, tokens: np.ndarray) -> str:
    """An answer's text, with `<mask>` for each mask."""
    ids = self.tokenizer.token_ids
    tokens = answer_tokens(tokens)
    tokens = np.where(tokens == ids.ge_end, ids.mask, tokens)
    said = tokens[tokens != ids.im_end]
    return self.tokenizer.decode(said, keep_special=True)


def _row_bucket(rows: int, most: int) -> int:
  """The next power of two, but no more than `most`."""
  return min(1 << (rows - 1).bit_length(), max(rows, most))


@jax.jit
def _in_bfloat16(state: nnx.State) -> nnx.State:
  """Weights in bfloat16; the quantizer stays as it is."""

  def cast(path, leaf):
    names = [getattr(key, "key", None) for key in path]
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    keep = "quantizer" in names or not is_float
    return leaf if keep else leaf.astype(jnp.bfloat16)

  return jax.tree_util.tree_map_with_path(cast, state)
