"""From one sample to one row of a batch, and from rows to a batch."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from argenseg_jax.config import SPEED_KEYS, DataConfig
from argenseg_jax.config_parsing import to_dict
from argenseg_jax.data import chat, image_codec, text, transforms
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import Sample, Source, Turn
from argenseg_jax.data.worker_signals import leave_ctrl_c_to_main
from argenseg_jax.types import Batch

# In an answer: what the source calls the target.
DESCRIPTION = "{description}"

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Row:
  """One row before batching."""

  fields: Batch  # Without the batch axis; of weight 0 where nothing is good.
  bad: tuple[tuple[int, str], ...] = ()  # Records, and what is wrong with them.
  cut: tuple[int, ...] = ()  # Records that lost tokens to fit sequence_length.

  @property
  def error(self) -> str:
    """What is wrong with the first bad record."""
    return self.bad[0][1] if self.bad else ""


class Remarks(NamedTuple):
  """What a log should say of the records of a batch."""

  bad: list[tuple[int, str]]  # Index, and what is wrong.
  cut: list[int]  # Indices of those that lost tokens.


class RowMaker:
  """Turns samples into rows; picklable, for worker processes.

  Args:
    source: where samples come from.
    config: what a row holds.
    tokenizer: the text tokenizer; None for rows without text, of
      sequence_length 0.
    image_tokens: vision embeddings that one image gives to the model.
    num_codes: image codes of one mask.
    codes: int32 [records m num_codes], if the masks are tokenized already; the
      masks themselves are then left unread.
  """

  def __init__(
    self,
    source: Source,
    config: DataConfig,
    *,
    tokenizer: text.TextTokenizer | None,
    image_tokens: int,
    num_codes: int,
    codes: np.ndarray | None = None,
  ):
    self.source = source
    self.config = config
    self.text_tokenizer = tokenizer
    self.image_tokens = image_tokens
    self.num_codes = num_codes
    self.codes = codes
    self._cache: dict[Any, Any] = {}
    # Samples whose images are in the cache, without their encoded bytes.
    self._cached_samples: dict[int, Sample] = {}

  def with_codes(self, codes: np.ndarray) -> "RowMaker":
    """The same rows with codes (see above) in place of their masks."""
    return RowMaker(
      self.source,
      self.config,
      tokenizer=self.text_tokenizer,
      image_tokens=self.image_tokens,
      num_codes=self.num_codes,
      codes=codes,
    )

  @property
  def tokenizer(self) -> text.TextTokenizer:
    """The text tokenizer of rows that hold text."""
    if self.text_tokenizer is None:
      raise ValueError("rows without text have no text tokenizer")
    return self.text_tokenizer

  def __getstate__(self):
    return {**self.__dict__, "_cache": {}, "_cached_samples": {}}

  def __setstate__(self, state):
    self.__dict__.update(state)
    leave_ctrl_c_to_main()  # Workers get their rows so.

  @property
  def fingerprint(self) -> str:
    """Changes with anything that changes the content or order of rows."""
    parts = tuple(self.content.values())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

  @property
  def content(self) -> dict[str, Any]:
    """What decides the content and order of rows; JSON-ready."""
    config = to_dict(self.config)
    for key in (*SPEED_KEYS, "path", "root", "text_tokenizer", "codes"):
      del config[key]
    return {
      "data settings": config,
      "data": self.source.fingerprint,
      "text tokenizer": self.text_tokenizer and self.text_tokenizer.fingerprint,
      "tokens of an image": self.image_tokens,
      "codes of a mask": self.num_codes,
    }

  def __call__(
    self,
    index: int,
    rng: np.random.Generator | None = None,
    *,
    length: int | None = None,
  ) -> Row:
    """The row of a record; one of zero weight if it is bad.

    Args:
      index: of the record; beyond the last one a row of zero weight.
      rng: draws the expression in training; without it the first is taken.
      length: positions that may be used, all by default.
    """
    if index >= len(self.source):
      return Row(self._empty(-1))
    try:
      sample = self._sample(index)
    except DataError as error:
      return Row(self._empty(index), bad=((index, str(error)),))
    return self.row(sample, rng, length=length)

  def row(
    self,
    sample: Sample,
    rng: np.random.Generator | None = None,
    *,
    length: int | None = None,
  ) -> Row:
    """The row of a sample that is read already; arguments as `__call__`."""
    length = self.config.sequence_length if length is None else length
    try:
      return self._make(sample, rng, length)
    except DataError as error:
      index = sample.index
      return Row(self._empty(index), bad=((index, str(error)),))

  def conversation(
    self, sample: Sample, rng: np.random.Generator | None = None
  ) -> tuple[Turn, ...]:
    """The turns of a sample, from its expressions or as they are stored."""
    if sample.conversation:
      return sample.conversation
    chosen = sample.expressions
    if not chosen or not all(e.strip() for e in chosen):
      raise DataError(f"{sample.where} has an empty expression.")
    if self.config.protocol == "per_expression":
      number = 0 if rng is None else rng.integers(len(chosen))
      chosen = (chosen[number],)
    template = sample.request or self.config.request
    request = chat.request_text(template, chosen, self.config.join)
    return (
      {"from": "human", "value": request},
      {"from": "gpt", "value": self._answer(sample)},
    )

  def _answer(self, sample: Sample) -> str:
    if not sample.seg_masks:
      return self.config.absent_answer
    if DESCRIPTION in self.config.answer and not sample.description:
      raise DataError(
        f"{sample.where} holds no description, which config key 'data.answer' "
        f"puts in place of {DESCRIPTION}."
      )
    said = chat.as_text(sample.description)
    return self.config.answer.replace(DESCRIPTION, said)

  def _make(
    self, sample: Sample, rng: np.random.Generator | None, length: int
  ) -> Row:
    config, cut = self.config, ()
    row = self._empty(sample.index)
    row.sample_weight[...] = 1
    chosen = bool(sample.options)
    if chosen and not self.source.has_options:
      name = type(self.source).__name__
      raise TypeError(f"{name} gives options; set its has_options.")
    if chosen:
      options = len(sample.options)
      sample = sample.choose(0 if rng is None else int(rng.integers(options)))
    if len(sample.seg_masks) > config.max_masks:
      raise DataError(
        f"{sample.where} has {len(sample.seg_masks)} masks; max_masks is "
        f"{config.max_masks}."
      )
    if config.max_images:
      if len(sample.images) > config.max_images:
        raise DataError(
          f"{sample.where} has {len(sample.images)} images; max_images is "
          f"{config.max_images}."
        )
      size = None
      for i in range(len(sample.images)):
        row.images[i], size = self._image(sample, i, rng)
      # With several: of which image is the mask?
      if len(sample.images) == 1 and size is not None:
        sample = sample.sized(size)
    row.mask_valid[: len(sample.seg_masks)] = True
    if self.codes is not None:
      row.codes[...] = self.codes[sample.index]
    else:
      for i in range(len(sample.seg_masks)):
        row.seg_masks[i] = self._target(sample, i)
    if config.cache and not chosen:
      self._cached_samples[sample.index] = dataclasses.replace(
        sample,
        images=(b"",) * len(sample.images),
        seg_masks=(b"",) * len(sample.seg_masks),
      )
    if config.sequence_length:
      turns = self.conversation(sample, rng)
      try:
        tokens = chat.tokenize_chat(
          self.tokenizer,
          turns,
          image_tokens=(self.image_tokens,) * len(sample.images),
          num_codes=self.num_codes,
          system_message=config.system_message,
        )
        special = self.tokenizer.token_ids
        fitting = tokens.cut(length, special)
        packed = chat.text_row((fitting,), config.sequence_length, special)
      except DataError as error:
        raise DataError(f"{sample.where}: {error}") from error
      row = row._replace(**vars(packed))
      cut = (sample.index,) if len(fitting) < len(tokens) else ()
    return Row(row, cut=cut)

  def _sample(self, index: int) -> Sample:
    found = self._cached_samples.get(index)
    return self.source[index] if found is None else found

  def _image(
    self, sample: Sample, number: int, rng: np.random.Generator | None
  ) -> tuple[np.ndarray, tuple[int, int] | None]:
    """An image as the model takes it, and its own height and width."""

    def make():
      pixels = sample.load_image(number)
      if self.config.jpeg_quality and rng is not None:
        quality = rng.integers(self.config.jpeg_quality, 101)
        pixels = image_codec.degrade(pixels, int(quality))
      resized = transforms.resize_image(
        pixels,
        self.config.image_side,
        backend=self.config.resize,
        pad_square=self.config.pad_square,
      )
      height, width = pixels.shape[:2]
      return resized, sample.size if sample.resized else (height, width)

    return self._cached(("image", sample.image_keys[number]), make)

  def _target(self, sample: Sample, number: int) -> np.ndarray:
    """A mask as the image tokenizer takes it, [h w 1], or an image."""
    config = self.config

    def make():
      if sample.target == "picture":
        if config.mask_channels != 3:
          raise DataError(
            f"{sample.where} is an image to generate; set config key "
            "'data.mask_channels' to 3."
          )
        return transforms.resize_image(
          image_codec.decode_image(
            sample.seg_masks[number], where=sample.where
          ),
          config.mask_side,
          backend=config.resize,
          pad_square=config.pad_square,
        )
      seg_mask = sample.load_seg_mask(number)
      if sample.kind == "absent" and seg_mask.any():
        raise DataError(
          f'{sample.where} is of kind "absent", but its mask has an object.'
        )
      if sample.kind != "absent" and not seg_mask.any():
        raise DataError(f"{sample.where} has a mask without a single pixel.")
      return transforms.mask_target(
        seg_mask,
        config.mask_side,
        intermediate_side=config.mask_intermediate_side,
        backend=config.resize,
        pad_square=config.pad_square,
      )[..., None]

    # One of several options is another mask at each visit.
    key = ("seg_mask", sample.index, number, sample.expressions)
    return self._cached(key, make)

  def _cached(self, key: Any, make: Callable[[], _T]) -> _T:
    if not self.config.cache:
      return make()
    if key not in self._cache:
      self._cache[key] = make()
    return self._cache[key]

  @functools.cached_property
  def _padding(self) -> chat.TextRow:
    """A row without text, shared: nobody writes into it."""
    return chat.padding_row(self.config.sequence_length)

  def _empty(self, index: int) -> Batch:
    c = self.config
    return Batch(
      **vars(self._padding),
      images=np.zeros((c.max_images, c.image_side, c.image_side, 3), np.uint8),
      seg_masks=np.zeros(
        (c.max_masks, c.mask_side, c.mask_side, c.mask_channels), np.uint8
      ),
      mask_valid=np.zeros(c.max_masks, np.bool_),
      codes=np.zeros(
        (c.max_masks, 0 if self.codes is None else self.num_codes), np.int32
      ),
      sample_weight=np.zeros((), np.float32),
      sample_id=np.array(index, np.int64),
    )


def stack_rows(rows: Sequence[Row]) -> tuple[Batch, Remarks]:
  """A batch of numpy arrays, and what to say of its records."""
  batch = Batch(*map(np.stack, zip(*(r.fields for r in rows), strict=True)))
  return batch, Remarks(
    bad=[bad for row in rows for bad in row.bad],
    cut=[cut for row in rows for cut in row.cut],
  )
