"""What every source yields, and the protocol that they share.

A source has a length, `source[i]` gives a `Sample` whose pictures are still
encoded, and `source.fingerprint` changes when its content does. It raises
`DataError` for a record that it cannot read, can be pickled for worker
processes, and opens large files on first use.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any, Literal, Protocol

import numpy as np

from argenseg_jax.data import masks, transforms
from argenseg_jax.data.errors import DataError
from argenseg_jax.runtime import paths

Turn = dict[str, str]  # {"from": "system"|"human"|"gpt", "value": text}


@dataclasses.dataclass(frozen=True)
class Option:
  """One of the things that can be asked of a picture."""

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
    options: where a picture holds several things: one of them is asked for at
      each visit, see `choose`.
    request: key of `chat.REQUEST_TEMPLATES`; empty takes the configuration's.
    description: names the target in full, for answers that say what they
      segment; empty where the source holds none.
    target: "mask", or "picture" where `seg_masks` holds pictures to generate.
    kind: what sort of request this is, for metrics; "absent" has no target.
    size: height and width of the picture where the source knows them.
    image_keys: one for each picture; equal keys mean equal pictures.
    resized: whether the pictures are stored as the pixels that rows hold, so
      that `size` is not theirs.
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
  image_keys: tuple[Any, ...] = ()
  resized: bool = False
  where: str = ""

  def load_image(self, number: int = 0) -> np.ndarray:
    """Decodes a picture to uint8 [h w 3]; DataError when it cannot be."""
    if number >= len(self.images):
      raise DataError(f"{self.where} has no picture, which its mask needs.")
    return transforms.decode_image(self.images[number], where=self.where)

  def load_seg_mask(self, number: int = 0) -> np.ndarray:
    """Decodes a mask to uint8 [h w], values as stored (0/1 or 0/255)."""
    stored, size = self.seg_masks[number], self.size
    if size is None and masks.needs_size(stored):
      size = self.load_image().shape[:2]
    return masks.load_seg_mask(stored, size=size, where=self.where)

  def sized(self, size: tuple[int, int]) -> "Sample":
    """The sample with the size that its only picture turned out to have.

    Raises:
      DataError: the annotations say another one.
    """
    if self.size not in (None, size):
      raise DataError(
        f"{self.where}: its picture has {size[1]}x{size[0]} pixels, the "
        f"annotations say {self.size[1]}x{self.size[0]}."
      )
    return dataclasses.replace(self, size=size)

  def choose(self, number: int) -> "Sample":
    """The sample that asks for one of its options."""
    option = self.options[number]
    return dataclasses.replace(
      self,
      options=(),
      expressions=option.expressions,
      seg_masks=(option.seg_mask,),
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
      answers=self.answers if number == len(ends) - 1 else (),
      kind=kind,
    )

  @property
  def num_past_masks(self) -> int:
    """Masks of all answers but the last."""
    answers = [t["value"] for t in self.conversation if t["from"] == "gpt"]
    return sum(answer.count("<mask>") for answer in answers[:-1])


class Source(Protocol):
  """What the pipeline needs of a source."""

  fingerprint: str

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


def read_file(path: paths.Path, advice: str) -> bytes:
  """A file's bytes; DataError with advice when it cannot be read."""
  try:
    return path.read_bytes()
  except OSError as error:
    raise DataError(
      f"cannot read {path}: {error.strerror or error}; {advice}."
    ) from error
  except ValueError as error:  # A name that no file can have.
    raise DataError(f"cannot read {str(path)!r}: {error}.") from error


def parse_json(raw: bytes, where: str, kind: type) -> Any:
  """JSON of the given type (dict or list); DataError names what is wrong."""
  try:
    value = json.loads(raw.decode("utf-8"))
  except UnicodeDecodeError as error:
    raise DataError(f"{where} is not UTF-8 text.") from error
  except (ValueError, RecursionError) as error:  # Numbers, nesting too long.
    raise DataError(f"{where} is not JSON: {error}.") from error
  if not isinstance(value, kind):
    noun = "object" if kind is dict else "list"
    raise DataError(f"{where} is not a JSON {noun}.")
  return value


def below(root: paths.Path, name: Any, where: str) -> paths.Path:
  """The file of a relative name; DataError where it would leave `root`."""
  if not isinstance(name, str) or not name:
    raise DataError(f"{where} names a file by {name!r}; use a path.")
  relative = pathlib.PurePosixPath(name)
  if ".." in relative.parts or relative.is_absolute():
    raise DataError(f"{where} names {name!r}, which is not below {root}.")
  return root / relative


def as_text(value: Any) -> str:
  """Text from what TFDS gives for it."""
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def digest(*parts: bytes | str) -> str:
  """A fingerprint of the parts."""
  encoded = (p.encode() if isinstance(p, str) else p for p in parts)
  return hashlib.sha256(b"\0".join(encoded)).hexdigest()[:16]


class TfdsRecords:
  """The records of a split that TFDS has prepared, read on first use.

  Args:
    path: the folder that holds dataset_info.json.
    split: its name.
    encoded: features that are left as encoded bytes.
  """

  def __init__(
    self, path: paths.Path, split: str, encoded: tuple[str, ...] = ()
  ):
    if not paths.is_local(path):
      raise DataError(
        f"ArrayRecord files as in {path} are read from a disk; mount "
        "the bucket (gcsfuse) or copy them."
      )
    self._path = path
    self._split = split
    self._encoded = encoded
    raw = read_file(
      path / "dataset_info.json", "give the folder of a prepared data set"
    )
    info = parse_json(raw, str(path / "dataset_info.json"), dict)
    try:
      self._counts = {
        str(s["name"]): sum(map(int, s["shardLengths"])) for s in info["splits"]
      }
    except (KeyError, TypeError, ValueError) as error:
      raise DataError(
        f"{path / 'dataset_info.json'} has no splits as TFDS writes them."
      ) from error
    if split not in self._counts:
      raise DataError(
        f"{path} has no split {split!r}; it has {', '.join(self._counts)}."
      )
    self.info = raw

  @functools.cached_property
  def _records(self):
    import tensorflow_datasets as tfds  # Slow to import; workers start lazily.

    builder = tfds.builder_from_directory(str(self._path))
    skip = tfds.decode.SkipDecoding()
    return builder.as_data_source(
      split=self._split, decoders=dict.fromkeys(self._encoded, skip)
    )

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_records"}

  def __len__(self) -> int:
    return self._counts[self._split]

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._records[index]
