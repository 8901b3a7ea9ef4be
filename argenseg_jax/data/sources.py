"""Random-access sources: where records come from.

A source has a length, `source[i]` gives a `Sample` whose pictures are still
encoded, and `source.fingerprint` changes when its content does. Sources can be
pickled for worker processes, and open their files on first use.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from argenseg_jax.data import masks, transforms
from argenseg_jax.data.errors import DataError

Turn = dict[str, str]  # {"from": "system"|"human"|"gpt", "value": text}


@dataclasses.dataclass(frozen=True)
class Sample:
  """One record.

  Attributes:
    index: its place in the source.
    dataset: name of the data set it belongs to.
    images: encoded bytes or paths, in the order of their placeholders.
    seg_masks: encoded bytes, paths or COCO segmentations, in the order of
      their placeholders; empty where nothing is to be segmented.
    expressions: wordings of one request; the pipeline puts them into a request
      template. Empty when `conversation` is given.
    conversation: the turns themselves.
    description: names the target in full, for answers that say what they
      segment; empty where the source holds none.
    kind: what sort of request this is, for metrics; "absent" has no target.
    image_keys: one for each picture; equal keys mean equal pictures.
    where: file and line, for messages.
  """

  index: int
  dataset: str
  images: tuple[bytes | pathlib.Path, ...]
  seg_masks: tuple[Any, ...]
  expressions: tuple[str, ...] = ()
  conversation: tuple[Turn, ...] = ()
  description: str = ""
  kind: str = "attribute"
  image_keys: tuple[Any, ...] = ()
  where: str = ""

  def load_image(self, number: int = 0) -> np.ndarray:
    """Decodes a picture to uint8 [h w 3]; DataError when it cannot be."""
    return transforms.decode_image(self.images[number], where=self.where)

  def load_seg_mask(self, number: int = 0) -> np.ndarray:
    """Decodes a mask to uint8 [h w], values as stored (0/1 or 0/255)."""
    size = None
    if isinstance(self.seg_masks[number], (dict, list)):
      size = self.load_image().shape[:2]
    return masks.load_seg_mask(
      self.seg_masks[number], size=size, where=self.where
    )


class Source(Protocol):
  """What the pipeline needs of a source."""

  fingerprint: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Sample: ...


class RefShapesSource:
  """A split of a folder that `ref_shapes.builder.prepare` returned."""

  def __init__(self, path: str | pathlib.Path, split: str):
    self.path = pathlib.Path(path)
    info, note = (
      self.path / name for name in ("dataset_info.json", "metadata.json")
    )
    if not (info.is_file() and note.is_file()):
      raise DataError(
        f"{self.path} holds no finished ref_shapes; build it with prepare()."
      )
    self.split = split
    counts = {
      s["name"]: sum(map(int, s["shardLengths"]))
      for s in json.loads(info.read_text())["splits"]
    }
    if split not in counts:
      raise DataError(
        f"{self.path} has no split {split!r}; it has {', '.join(counts)}."
      )
    self._length = counts[split]
    self.fingerprint = _digest(note.read_bytes(), split.encode())

  @functools.cached_property
  def _records(self):
    import tensorflow_datasets as tfds  # Slow to import; workers start lazily.

    builder = tfds.builder_from_directory(str(self.path))
    skip = tfds.decode.SkipDecoding()
    return builder.as_data_source(
      split=self.split, decoders={"image": skip, "seg_mask": skip}
    )

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_records"}

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Sample:
    record = self._records[index]
    kind = _text(record["kind"])
    return Sample(
      index=index,
      dataset="ref_shapes",
      images=(record["image"],),
      seg_masks=() if kind == "absent" else (record["seg_mask"],),
      expressions=tuple(_text(e) for e in record["expressions"]),
      description=_text(record["description"]),
      kind=kind,
      image_keys=(int(record["scene_id"]),),
      where=f"{self.path} {self.split} record {index}",
    )


class JsonlSource:
  """ARGenSeg's and InternVL's chat records, one JSON object a line.

  Reads "image" (absent, a path or a list), "mask" (absent, a path, a COCO
  segmentation or a list of either) and "conversations". All lines are checked
  when the source is opened.

  Args:
    path: the jsonl file.
    root: what picture paths are relative to; the jsonl's folder by default.
    check_files: whether to look for every picture and mask at once.
  """

  def __init__(
    self,
    path: str | pathlib.Path,
    root: str | pathlib.Path | None = None,
    check_files: bool = True,
  ):
    self.path = pathlib.Path(path)
    self.root = pathlib.Path(root) if root else self.path.parent
    try:
      raw = self.path.read_bytes()
    except OSError as error:
      raise DataError(
        f"cannot read {self.path}: {error.strerror}; give a jsonl file."
      ) from error
    self._samples: list[Sample] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
      if line.strip():
        self._samples.append(self._parse(line, number, check_files))
    if not self._samples:
      raise DataError(f"{self.path} holds no records.")
    self.fingerprint = _digest(raw, str(self.root).encode())

  def __len__(self) -> int:
    return len(self._samples)

  def __getitem__(self, index: int) -> Sample:
    return self._samples[index]

  def _parse(self, line: bytes, number: int, check_files: bool) -> Sample:
    where = f"{self.path} line {number}"
    try:
      record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
      raise DataError(f"{where} is not UTF-8 text.") from error
    except json.JSONDecodeError as error:
      raise DataError(f"{where} is not JSON: {error.msg}.") from error
    if not isinstance(record, dict):
      raise DataError(f"{where} is not a JSON object.")
    images = tuple(
      self._locate(p, where, check_files) for p in _as_list(record.get("image"))
    )
    seg_masks = tuple(
      self._locate(m, where, check_files) if isinstance(m, str) else m
      for m in _as_list(record.get("mask"), segmentations=True)
    )
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
      index=len(self._samples),
      dataset=str(record.get("dataset", self.path.stem)),
      images=images,
      seg_masks=seg_masks,
      conversation=conversation,
      kind="referring" if seg_masks else "text",
      image_keys=tuple(str(p) for p in images),
      where=where,
    )

  def _locate(self, name: Any, where: str, check: bool) -> pathlib.Path:
    if not isinstance(name, str) or not name:
      raise DataError(f"{where} names a file by {name!r}; use a path.")
    relative = pathlib.PurePosixPath(name)
    if ".." in relative.parts or relative.is_absolute():
      raise DataError(
        f"{where} names {name!r}, which is not below {self.root}."
      )
    found = self.root / relative
    if check and not found.is_file():
      raise DataError(f"{where} names {found}, which does not exist.")
    return found


class EachExpression:
  """Every expression of every record as a sample of its own.

  The per-expression protocol of evaluation. Conversations stay as they are.
  """

  def __init__(self, source: Source):
    self._source = source
    self._places = [
      (index, number)
      for index in range(len(source))
      for number in range(max(len(source[index].expressions), 1))
    ]
    self.fingerprint = _digest(source.fingerprint.encode(), b"each expression")

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> Sample:
    record, number = self._places[index]
    sample = self._source[record]
    return dataclasses.replace(
      sample, index=index, expressions=sample.expressions[number : number + 1]
    )


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


def _text(value: Any) -> str:
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _digest(*parts: bytes) -> str:
  return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
