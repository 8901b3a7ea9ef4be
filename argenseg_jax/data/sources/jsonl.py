"""Chat records, one JSON object a line, and image-caption pairs."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from argenseg_jax.data.chat import request_text
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import (
  Sample,
  Turn,
  below,
  digest,
  parse_json,
  read_file,
)
from argenseg_jax.runtime.paths import as_path, is_local


class JsonLines:
  """The lines of a jsonl file that are not blank, found without parsing them.

  It is read once for offsets and fingerprint, then mapped: millions of lines
  cost memory for their offsets only, unless they are in a bucket.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = as_path(path)
    raw = read_file(self.path, "give a jsonl file")
    self.fingerprint = digest(raw)
    data = np.frombuffer(raw, np.uint8)
    ends = np.append(np.flatnonzero(data == ord("\n")), len(raw))
    starts = np.concatenate(([0], ends[:-1] + 1))
    blank = [not raw[a:b].strip() for a, b in zip(starts, ends, strict=True)]
    self._numbers = np.flatnonzero(~np.array(blank))
    self._places = np.stack((starts, ends), 1)[self._numbers]
    if not len(self._numbers):
      raise DataError(f"{self.path} holds no records.")

  @functools.cached_property
  def _data(self) -> np.ndarray:
    if is_local(self.path):
      return np.memmap(self.path, np.uint8, "r")
    return np.frombuffer(read_file(self.path, "it was there"), np.uint8)

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_data"}

  def __len__(self) -> int:
    return len(self._numbers)

  def where(self, index: int) -> str:
    return f"{self.path} line {self._numbers[index] + 1}"

  def __getitem__(self, index: int) -> dict[str, Any]:
    start, end = self._places[index]
    return parse_json(self._data[start:end].tobytes(), self.where(index), dict)


class _LinesSource:
  """What the sources of this file share.

  Args:
    path: the jsonl file.
    root: what picture paths are relative to; the jsonl's folder by default.
  """

  def __init__(
    self, path: str | pathlib.Path, root: str | pathlib.Path | None = None
  ):
    self.path = as_path(path)
    self.root = as_path(root) if root else self.path.parent
    self._lines = JsonLines(self.path)
    self.fingerprint = self._lines.fingerprint

  def __len__(self) -> int:
    return len(self._lines)


class JsonlSource(_LinesSource):
  """ARGenSeg's and InternVL's chat records.

  Reads "image" (absent, a path or a list), "mask" (absent, a path, a COCO
  segmentation or a list of either), "conversations", and where given "dataset",
  "kind" ("absent" allows a mask without any pixel) and "answers" (a list, of
  several people to the last question). Several masks, several
  turns, several pictures, and text alone are all records of this layout.

  A record without "conversations" may be a question to a picture: "question"
  (or "text"), with "answer" (or "label") or "answers", and "choices" (texts)
  for a multiple choice. Its kind, where it names none, is that of its answers:
  "choice", "vqa" for several people's answers, "yes_no", or else "text".
  """

  def __getitem__(self, index: int) -> Sample:
    record, where = self._lines[index], self._lines.where(index)
    images = tuple(
      below(self.root, p, where) for p in _as_list(record.get("image"))
    )
    seg_masks = tuple(
      below(self.root, m, where) if isinstance(m, str) else m
      for m in _as_list(record.get("mask"), segmentations=True)
    )
    if "conversations" not in record and {"question", "text"} & record.keys():
      record = _as_chat(record, where)
    conversation = _conversation(record.get("conversations"), where)
    placeholders = sum(
      turn["value"].count("<mask>")
      for turn in conversation
      if turn["from"] == "gpt"
    )
    if placeholders != len(seg_masks):
      raise DataError(
        f"{where} has {len(seg_masks)} masks but {placeholders} <mask> in its "
        "answers."
      )
    return Sample(
      index=index,
      dataset=str(record.get("dataset", self.path.stem)),
      images=images,
      seg_masks=seg_masks,
      conversation=conversation,
      answers=tuple(map(str, _as_list(record.get("answers")))),
      kind=str(record.get("kind", "referring" if seg_masks else "text")),
      image_keys=tuple(str(p) for p in images),
      where=where,
    )


class TextToImageSource(_LinesSource):
  """Pictures to generate: lines of {"image": path, "text": caption}.

  "caption" is read where "text" is missing. The picture becomes the target in
  place of a mask, so rows need `mask_channels` 3.
  """

  def __getitem__(self, index: int) -> Sample:
    record, where = self._lines[index], self._lines.where(index)
    caption = record.get("text", record.get("caption"))
    if not isinstance(caption, str) or not caption.strip():
      raise DataError(f'{where} needs "text", the caption of its picture.')
    return Sample(
      index=index,
      dataset=str(record.get("dataset", self.path.stem)),
      images=(),
      seg_masks=(below(self.root, record.get("image"), where),),
      conversation=(
        {"from": "human", "value": request_text("generation", [caption])},
        {"from": "gpt", "value": "<mask>"},
      ),
      target="picture",
      kind="generation",
      where=where,
    )


def _as_chat(record: dict[str, Any], where: str) -> dict[str, Any]:
  """A question with its answers as a chat record."""
  question = str(record.get("question", record.get("text")))
  answers = _as_list(record.get("answers"))
  answer = record.get("answer", record.get("label"))
  if answer is None and answers:
    answer = max(answers, key=answers.count)
  if answer is None:
    raise DataError(f'{where} asks a question without "answer" or "answers".')
  choices = _as_list(record.get("choices"))
  question = "\n".join(
    [question, *(f"{chr(65 + i)}. {text}" for i, text in enumerate(choices))]
  )
  if choices:
    kind = "choice"
  elif len(answers) > 1:
    kind = "vqa"
  else:
    kind = "yes_no" if str(answer).lower() in ("yes", "no") else "text"
  kind = record.get("kind", kind)
  template = kind if kind in ("choice", "caption") else "question"
  asked = request_text(template, [question])
  if not record.get("image"):
    asked = asked.replace("<image>\n", "")
  turns = [
    {"from": "human", "value": asked},
    {"from": "gpt", "value": str(answer)},
  ]
  return record | {"kind": kind, "answers": answers, "conversations": turns}


def _conversation(turns: Any, where: str) -> tuple[Turn, ...]:
  valid = isinstance(turns, list) and all(
    isinstance(t, Mapping)
    and t.get("from") in ("system", "human", "gpt")
    and isinstance(t.get("value"), str)
    for t in turns
  )
  if not valid or not turns:
    raise DataError(
      f'{where} needs "conversations": a list of {{"from": "human" or '
      '"gpt", "value": text}}.'
    )
  return tuple({"from": t["from"], "value": t["value"]} for t in turns)


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
