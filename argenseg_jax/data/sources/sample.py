"""What every source yields, and the protocol that they share.

A source has a length, `source[i]` gives a `Sample` whose images are still
encoded, and `source.fingerprint` changes when its content does. It raises
`DataError` for a record that it cannot read, can be pickled for worker
processes, and opens large files on first use.
"""

import dataclasses
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, UInt8

from argenseg_jax.data import image_codec, masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.mask_values import Reading
from argenseg_jax.data.sources.parsing import digest
from argenseg_jax.runtime import paths

Turn = dict[str, str]  # {"from": "system"|"human"|"gpt", "value": text}


@dataclasses.dataclass(frozen=True)
class Option:
  """One of the things that can be asked of an image."""

  expressions: tuple[str, ...]
  seg_mask: Any


@dataclasses.dataclass(frozen=True)
class Sample:
  """One record.

  Attributes:
    index: its place in the source.
    dataset: name of the data set it belongs to.
    images: encoded bytes or paths, in the order of their placeholders.
    seg_masks: encoded bytes, paths or whatever `masks.load_seg_mask` reads, in
      the order of their placeholders; empty where nothing is to be segmented.
    expressions: wordings of one request; the pipeline puts them into a request
      template. Empty when `conversation` is given.
    conversation: the turns themselves.
    answers: of several people to the last question, where it was asked of
      several; for metrics.
    options: where a image holds several things: one of them is asked for at
      each visit, see `choose`.
    request: key of `chat.REQUEST_TEMPLATES`; empty takes the configuration's.
    description: names the target in full, for answers that say what they
      segment; empty where the source holds none.
    target: "mask", or "picture" where `seg_masks` holds images to generate.
    kind: what sort of request this is, for metrics; "absent" has no target.
    size: height and width of the image where the source knows them.
    ignores: one for each of `seg_masks`, or none at all: pixels that metrics
      leave out, stored like masks; None where there are none.
    image_keys: one for each image; equal keys mean equal images.
    resized: whether the images are stored as the pixels that rows hold, so
      that `size` is not theirs.
    upright: whether the masks lie on the images as EXIF turns them, beyond
      doubt.
    frame: how the only image is stored, where that was read already.
    where: file and line, for messages.
  """

  index: int
  dataset: str
  images: tuple[bytes | paths.Path, ...]
  seg_masks: tuple[Any, ...]
  expressions: tuple[str, ...] = ()
  conversation: tuple[Turn, ...] = ()
  answers: tuple[str, ...] = ()
  options: tuple[Option, ...] = ()
  request: str = ""
  description: str = ""
  target: Literal["mask", "picture"] = "mask"
  kind: str = "attribute"
  size: tuple[int, int] | None = None
  ignores: tuple[Any, ...] = ()
  image_keys: tuple[Any, ...] = ()
  resized: bool = False
  upright: bool = False
  frame: image_codec.Frame | None = None
  where: str = ""

  def load_image(self, number: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image; DataError when it cannot be."""
    if number >= len(self.images):
      raise DataError(f"{self.where} has no image, which its mask needs.")
    return image_codec.decode_image(self.images[number], where=self.where)

  def load_seg_mask(self, number: int = 0) -> Bool[np.ndarray, "h w"]:
    """Decodes a mask, upright as its image is shown; DataError when it cannot
    be, or could mean several things."""
    return self.read_mask(self.seg_masks[number]).seg_mask

  def load_ignore(self, number: int = 0) -> Bool[np.ndarray, "h w"] | None:
    """The pixels that metrics leave out of mask `number`, if there are any."""
    stored = self.ignores[number] if self.ignores else None
    return None if stored is None else self.read_mask(stored).seg_mask

  def read_mask(self, stored: Any) -> Reading:
    """Decodes one of the stored masks, upright, and says how it was stored."""
    if self.resized or self.upright or not self.images:
      return self._read_mask(stored, self.size)
    try:
      frame = self.frame or self._read_frame()
    except DataError:  # Named where the image itself is needed.
      return self._read_mask(stored, self.size)
    if len(self.images) > 1:  # Of which is the mask?
      if frame.orientation != 1:
        raise self._unknown_turn(frame.orientation, "image", "mask")
      return self._read_mask(stored, self.size)
    if frame.orientation == 1:
      size = self.size
      if size is None and masks.needs_size(stored):
        size = frame.size
      reading = self._read_mask(stored, size)
      if reading.orientation == 1:
        return reading
      raise self._unknown_turn(reading.orientation, "mask", "image")
    return self._read_turned(stored, frame)

  def _read_mask(self, stored: Any, size: tuple[int, int] | None) -> Reading:
    if size is None and masks.needs_size(stored):
      size = self.load_image().shape[:2]
    try:
      return masks.read(stored, size=size, where=self.where)
    except DataError as error:
      if self.where in str(error):
        raise
      raise DataError(f"{self.where}: {error}") from error

  def _read_frame(self) -> image_codec.Frame:
    """Of the only image, or of the first of several that is turned."""
    frames = (
      image_codec.image_frame(image, where=self.where) for image in self.images
    )
    first = next(frames)
    turned = (frame for frame in frames if frame.orientation != 1)
    return first if first.orientation != 1 else next(turned, first)

  def _read_turned(self, stored: Any, frame: image_codec.Frame) -> Reading:
    """A mask of an image that EXIF turns: its size says whether it was drawn
    on the image as stored or as shown."""
    unknown = self._unknown_turn(frame.orientation, "image", "mask")
    if self.size is None and masks.needs_size(stored):
      raise unknown
    reading = self._read_mask(stored, self.size)
    size = reading.seg_mask.shape
    if size not in (frame.size, frame.upright_size):
      height, width = frame.upright_size
      raise DataError(
        f"{self.where}: the mask has {size[1]}x{size[0]} pixels but the image "
        f"{width}x{height}."
      )
    if reading.orientation == frame.orientation:  # Both were turned.
      return reading
    if reading.orientation != 1 or frame.size == frame.upright_size:
      raise unknown
    if size == frame.upright_size:
      return reading
    turned = image_codec.turn(reading.seg_mask, frame.orientation)
    return dataclasses.replace(reading, seg_mask=turned)

  def _unknown_turn(self, orientation: int, one: str, other: str) -> DataError:
    return DataError(
      f"{self.where}: EXIF orientation {orientation} turns or mirrors its "
      f"{one}, and nothing says whether the {other} follows; store both "
      "upright, without that tag."
    )

  def sized(self, size: tuple[int, int]) -> "Sample":
    """The sample with the size that its only image turned out to have.

    Raises:
      DataError: the annotations say another one.
    """
    frame = self.frame
    if frame is None and not (self.resized or self.upright):
      frame = self._read_frame()
    turned = frame if frame is not None and frame.orientation != 1 else None
    fitting = (size, turned.size) if turned is not None else (size,)
    if self.size is not None and self.size not in fitting:
      raise DataError(
        f"{self.where}: its image has {size[1]}x{size[0]} pixels, the "
        f"annotations say {self.size[1]}x{self.size[0]}."
      )
    if (
      turned is not None
    ):  # Its own size says which way up the annotations are.
      return dataclasses.replace(self, frame=frame)
    return dataclasses.replace(self, size=size, frame=frame)

  def choose(self, number: int) -> "Sample":
    """The sample that asks for one of its options."""
    option = self.options[number]
    return dataclasses.replace(
      self,
      options=(),
      expressions=option.expressions,
      seg_masks=(option.seg_mask,),
      ignores=(),
    )

  def until_answer(self, number: int) -> "Sample":
    """The sample whose conversation ends with this answer, from 0 on."""
    ends = [i for i, t in enumerate(self.conversation) if t["from"] == "gpt"]
    turns = self.conversation[: ends[number] + 1]
    drawn = [t["value"].count("<mask>") for t in turns if t["from"] == "gpt"]
    kind = self.kind
    if bool(drawn[-1]) != bool(self.seg_masks):  # One of several sorts.
      kind = "referring" if drawn[-1] else "text"
    return dataclasses.replace(
      self,
      conversation=turns,
      seg_masks=self.seg_masks[: sum(drawn)],
      ignores=self.ignores[: sum(drawn)],
      answers=self.answers if number == len(ends) - 1 else (),
      kind=kind,
    )

  @property
  def num_past_masks(self) -> int:
    """Masks of all answers but the last."""
    answers = [t["value"] for t in self.conversation if t["from"] == "gpt"]
    return sum(answer.count("<mask>") for answer in answers[:-1])


class Source(Protocol):
  """What the pipeline needs of a source.

  Attributes:
    fingerprint: changes with the content of its records.
    has_options: whether a record may hold several things, of which one is
      asked for at each visit (`Sample.options`).
    has_turns: whether a record may be a conversation of several answers.
    notes: what was left out at opening, a sentence each.
  """

  fingerprint: str
  has_options: bool
  has_turns: bool
  notes: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Sample: ...


class EachRequest:
  """Every option of every record as a sample of its own, for evaluation.

  So is every answer of a conversation: its sample ends with it, and holds the
  turns before.

  Args:
    source: the records; one that cannot be read stays one bad sample.
    each_expression: split expressions too (the per-expression protocol).
  """

  def __init__(self, source: Source, *, each_expression: bool):
    self._source = source
    # Record, option, and expression or answer.
    self._places: list[tuple[int, int | None, int | None]] = []
    for index in range(len(source)):
      try:
        sample = source[index]
      except DataError:
        self._places.append((index, None, None))
        continue
      options = range(len(sample.options)) if sample.options else (None,)
      for option in options:
        chosen = sample if option is None else sample.choose(option)
        count = len(chosen.expressions) if each_expression else 0
        if chosen.conversation:
          count = sum(t["from"] == "gpt" for t in chosen.conversation)
        for number in range(count) if count else (None,):
          self._places.append((index, option, number))
    self.fingerprint = digest(
      source.fingerprint, f"each request {each_expression}"
    )
    self.has_options = self.has_turns = False
    self.notes = source.notes

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> Sample:
    record, option, number = self._places[index]
    sample = self._source[record]
    if option is not None:
      sample = sample.choose(option)
    sample = dataclasses.replace(sample, index=index)
    if number is None:
      return sample
    if sample.conversation:
      return sample.until_answer(number)
    expressions = sample.expressions[number : number + 1]
    return dataclasses.replace(sample, expressions=expressions)
