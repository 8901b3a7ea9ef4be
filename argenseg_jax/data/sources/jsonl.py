"""Chat records, one JSON object a line, and image-caption pairs."""

import functools
import os
import pathlib
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from argenseg_jax.data import input_files
from argenseg_jax.data.chat import request_text
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import parsing, questions
from argenseg_jax.data.sources.parsing import below, read_file, required_text
from argenseg_jax.data.sources.sample import Sample, Turn
from argenseg_jax.runtime.paths import Path, as_path, is_local

_BOM = parsing.BOM.encode()


class JsonLines:
  """The lines of a jsonl file that are not blank, found without parsing them.

  It is read once for offsets and fingerprint, then by pieces: millions of lines
  cost memory for their offsets only, unless they are in a bucket.
  """

  def __init__(self, path: str | Path):
    self.path = as_path(path)
    raw = read_file(self.path, "give a jsonl file")
    self.fingerprint = parsing.digest(raw)
    data = np.frombuffer(raw, np.uint8)
    ends = np.append(np.flatnonzero(data == ord("\n")), len(raw))
    starts = np.concatenate(([0], ends[:-1] + 1))
    blank = [
      not raw[a:b].removeprefix(_BOM).strip()
      for a, b in zip(starts, ends, strict=True)
    ]
    self._numbers = np.flatnonzero(~np.array(blank))
    self._places = np.stack((starts, ends), 1)[self._numbers]
    if not len(self._numbers):
      raise DataError(f"{self.path} contains no records.")
    self._stamp = None
    if is_local(self.path):
      with open(self._file, "rb", closefd=False) as file:
        self._stamp = input_files.stamp_of(file.fileno())
      if self._stamp.size != len(raw):
        raise self._changed()

  @functools.cached_property
  def _file(self) -> int:
    descriptor = input_files.open_regular(self.path)
    weakref.finalize(self, os.close, descriptor)
    return descriptor

  @functools.cached_property
  def _data(self) -> bytes:
    return read_file(self.path, "it was there")

  def __getstate__(self):
    return {
      k: v for k, v in self.__dict__.items() if k not in ("_data", "_file")
    }

  def __len__(self) -> int:
    return len(self._numbers)

  def where(self, index: int) -> str:
    return f"{self.path} line {self._numbers[index] + 1}"

  def __getitem__(self, index: int) -> dict[str, Any]:
    start, end = map(int, self._places[index])
    raw = self._read(start, end)
    return parsing.parse_json(raw, self.where(index), dict, strict=True)

  def _read(self, start: int, end: int) -> bytes:
    if self._stamp is None:
      return self._data[start:end]
    # Not mapped: where a mapped file is cut short, the process dies.
    raw = os.pread(self._file, end - start, start)
    if input_files.stamp_of(self._file) != self._stamp:
      raise self._changed()
    return raw

  def _changed(self) -> DataError:
    return DataError(
      f"{self.path} has changed since it was opened; start again when it is "
      "complete."
    )


class _LinesSource:
  """What the sources of this file share.

  Args:
    path: the jsonl file.
    root: what image paths are relative to; the jsonl's folder by default.
  """

  has_options = False
  has_turns = False
  notes = ()

  def __init__(
    self, path: str | pathlib.Path, root: str | pathlib.Path | None = None
  ):
    self.path = as_path(path)
    self.root = as_path(root) if root else self.path.parent
    self._lines = JsonLines(self.path)
    self.fingerprint = self._lines.fingerprint

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "_LinesSource":
    return cls(path, root)

  def __len__(self) -> int:
    return len(self._lines)

  def _record(self, index: int) -> tuple[dict[str, Any], str]:
    """A record without what is null, and its line."""
    where = self._lines.where(index)
    record = self._lines[index]
    record = {key: v for key, v in record.items() if v is not None}
    questions.require_known_keys(record, where)
    return record, where

  def _dataset(self, record: dict[str, Any], where: str) -> str:
    name = record.get("dataset", self.path.stem)
    return required_text(name, where, "dataset")


class JsonlSource(_LinesSource):
  """ARGenSeg's and InternVL's chat records.

  Reads "image" (absent, a path or a list), "mask" (absent, a path, a COCO
  segmentation or a list of either), "conversations", and where given "dataset",
  "kind" ("absent" allows a mask without any pixel), "ignore" (to each mask,
  what metrics leave out: like "mask", null where nothing), "width" and "height"
  (of the only image, which must agree) and "answers" (a list, of several people
  to the last question). Several masks, several
  turns, several images, and text alone are all records of this layout. null
  is the same as an absent key.

  A record without "conversations" may be a question to an image: "question"
  (or "text"), with "answer" (or "label") or "answers", and "choices" (texts)
  for a multiple choice; see `questions`.
  """

  has_turns = True

  def __getitem__(self, index: int) -> Sample:
    record, where = self._record(index)
    images = tuple(below(self.root, p, where) for p in _images(record))
    seg_masks = self._stored(record.get("mask"), where)
    ignores = self._stored(record.get("ignore"), where)
    if ignores and len(ignores) != len(seg_masks):
      raise DataError(
        f'{where} has {len(ignores)} "ignore" but {len(seg_masks)} masks; give '
        "one for each mask, null where nothing is left out."
      )
    if both := [m for m in seg_masks if m in images]:
      raise DataError(f"{where} names {both[0]} as image and as mask.")
    if "conversations" not in record and {"question", "text"} & record.keys():
      record = questions.as_chat(record, where)
    conversation = _conversation(record.get("conversations"), where)
    _require_placeholders(conversation, images, seg_masks, where)
    kind = record.get("kind", "referring" if seg_masks else "text")
    return Sample(
      index=index,
      dataset=self._dataset(record, where),
      images=images,
      seg_masks=seg_masks,
      ignores=ignores,
      size=_size(record, where) if len(images) == 1 and seg_masks else None,
      conversation=conversation,
      answers=questions.answers_of(record, where),
      kind=required_text(kind, where, "kind"),
      image_keys=tuple(str(p) for p in images),
      where=where,
    )

  def _stored(self, value: Any, where: str) -> tuple:
    """Masks, of which files are named."""
    return tuple(
      below(self.root, m, where) if isinstance(m, str) else m
      for m in _as_list(value, segmentations=True)
    )


class TextToImageSource(_LinesSource):
  """Images to generate: lines of {"image": path, "text": caption}.

  "caption" is read where "text" is missing. The image becomes the target in
  place of a mask, so rows need `mask_channels` 3.
  """

  def __getitem__(self, index: int) -> Sample:
    record, where = self._record(index)
    caption = record.get("text", record.get("caption"))
    if not isinstance(caption, str) or not parsing.clean(caption):
      raise DataError(f'{where} needs "text", the caption of its image.')
    return Sample(
      index=index,
      dataset=self._dataset(record, where),
      images=(),
      seg_masks=(below(self.root, record.get("image"), where),),
      conversation=(
        {
          "from": "human",
          "value": request_text("generation", [parsing.clean(caption)]),
        },
        {"from": "gpt", "value": "<mask>"},
      ),
      target="picture",
      kind="generation",
      where=where,
    )


def _images(record: dict[str, Any]) -> list:
  """Names of the images; "" is what some write for text alone."""
  image = record.get("image", [])
  if image == "" and "conversations" in record:
    return []
  return image if isinstance(image, list) else [image]


def _size(record: dict[str, Any], where: str) -> tuple[int, int] | None:
  """Height and width that a record gives its image; None without both."""
  if not {"width", "height"} <= record.keys():
    return None
  try:
    return parsing.as_size(record)
  except (TypeError, ValueError, OverflowError) as error:
    raise DataError(
      f'{where} has a "width" or "height" that is none: {error}.'
    ) from error


def _require_placeholders(
  conversation: tuple[Turn, ...], images: tuple, seg_masks: tuple, where: str
) -> None:
  """Every `<mask>` of the answers has a mask, every `<image>` an image."""
  text = {"human": "", "gpt": "", "system": ""}
  for turn in conversation:
    text[turn["from"]] += turn["value"]
  placed = text["gpt"].count("<mask>")
  if placed != len(seg_masks):
    raise DataError(
      f"{where} has {len(seg_masks)} masks but {placed} <mask> in its answers."
    )
  placed = text["human"].count("<image>")
  if placed > len(images):
    raise DataError(
      f"{where} has {placed} <image> in its requests but {len(images)} in "
      '"image".'
    )


def _conversation(turns: Any, where: str) -> tuple[Turn, ...]:
  if not isinstance(turns, list) or not turns:
    raise DataError(
      f'{where} needs "conversations": a list of {{"from": "human" or '
      '"gpt", "value": text}}.'
    )
  for number, turn in enumerate(turns, 1):
    fault = _fault_of_turn(turn)
    if fault:
      raise DataError(
        f'{where} needs "conversations" with other turns: turn '
        f"{number} {fault}."
      )
  if turns[-1]["from"] != "gpt":
    raise DataError(f"{where}: its conversation does not end with an answer.")
  return tuple(
    {"from": t["from"], "value": t["value"].removeprefix(parsing.BOM)}
    for t in turns
  )


def _fault_of_turn(turn: Any) -> str:
  if not isinstance(turn, Mapping):
    return 'is no {"from": ..., "value": ...}'
  if turn.get("from") not in ("system", "human", "gpt"):
    return f'is from {turn.get("from")!r:.40}; use "human" or "gpt"'
  value = turn.get("value")
  if not isinstance(value, str):
    return 'has no text in "value"'
  if not parsing.clean(value) and turn["from"] != "system":
    return "is empty"
  return ""


def _as_list(value: Any, segmentations: bool = False) -> list:
  """A list of files, or of COCO segmentations, from one, several or none."""
  if value is None or value == "":
    return []
  if not isinstance(value, list):
    return [value]
  if segmentations and value and _is_polygons(value):
    return [value]
  return value


def _is_polygons(value: list) -> bool:
  return all(
    isinstance(p, list) and p and isinstance(p[0], (int, float)) for p in value
  )
