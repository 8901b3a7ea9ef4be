"""Samples packed into ArrayRecord files, see `argenseg_jax.data.building`."""

import json
import pathlib
from typing import Any

import cv2

from argenseg_jax.data import transforms
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import (
  Option,
  Sample,
  TfdsRecords,
  as_text,
  digest,
  parse_json,
  read_file,
)

# Beside TFDS' own files: where the records came from, and their digests.
NOTE = "source.json"
_PLAIN = ("dataset", "request", "description", "target", "kind", "where")


class ArrayRecordSource:
  """A split of a folder that `building.build` wrote.

  Args:
    path: the folder that holds dataset_info.json.
    split: its name.
  """

  def __init__(self, path: str | pathlib.Path, split: str):
    self.path = pathlib.Path(path)
    note = self.path / NOTE
    raw = read_file(note, "give a folder that `argenseg data build` wrote")
    self._records = TfdsRecords(self.path, split)
    splits = parse_json(raw, str(note), dict)
    try:
      self.has_options = bool(splits[split]["options"])
    except (KeyError, TypeError) as error:
      raise DataError(f"{note} says nothing of split {split!r}.") from error
    self.fingerprint = digest(raw, split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Sample:
    return decode(self._records[index], index)


def encode(sample: Sample) -> dict[str, Any]:
  """A sample as a record; its pictures keep their bytes, masks become PNGs.

  Raises:
    DataError: a picture or mask cannot be read, or they differ in size.
  """
  pixels = [sample.load_image(i) for i in range(len(sample.images))]
  if len(pixels) == 1:
    sample = sample.sized(pixels[0].shape[:2])
  chosen = [sample.choose(i) for i in range(len(sample.options))]
  seg_masks = []
  for holder in (sample, *chosen):
    for number, stored in enumerate(holder.seg_masks):
      if sample.target == "picture":
        transforms.decode_image(stored, where=sample.where)
        seg_masks.append(transforms.read_encoded(stored, sample.where)[0])
      else:
        _, png = cv2.imencode(".png", holder.load_seg_mask(number))
        seg_masks.append(png.tobytes())
  meta = {name: getattr(sample, name) for name in _PLAIN} | {
    "expressions": sample.expressions,
    "conversation": sample.conversation,
    "options": [option.expressions for option in sample.options],
    "size": None if sample.size is None else [int(n) for n in sample.size],
    "image_keys": [str(key) for key in sample.image_keys],
  }
  return {
    "meta": json.dumps(meta),
    "images": [
      transforms.read_encoded(stored, sample.where)[0]
      for stored in sample.images
    ],
    "seg_masks": seg_masks,
  }


def decode(record: dict[str, Any], index: int) -> Sample:
  """The sample of a record.

  Raises:
    DataError: it is not one that `encode` made.
  """
  try:
    return _decode(record, index)
  except (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
  ) as error:
    raise DataError(f"record {index} is malformed ({error}).") from error


def _decode(record: dict[str, Any], index: int) -> Sample:
  meta = json.loads(as_text(record["meta"]))
  seg_masks = tuple(record["seg_masks"])
  options = meta["options"]
  stored = seg_masks[: len(seg_masks) - len(options)]
  return Sample(
    **{name: meta[name] for name in _PLAIN},
    index=index,
    images=tuple(record["images"]),
    seg_masks=stored,
    expressions=tuple(meta["expressions"]),
    conversation=tuple(meta["conversation"]),
    options=tuple(
      Option(tuple(wordings), seg_mask)
      for wordings, seg_mask in zip(
        options, seg_masks[len(stored) :], strict=True
      )
    ),
    size=meta["size"] and tuple(meta["size"]),
    image_keys=tuple(meta["image_keys"]),
  )
