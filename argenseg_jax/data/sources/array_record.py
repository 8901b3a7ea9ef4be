"""Samples packed into ArrayRecord files, see `data.array_record_writer`."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool

from argenseg_jax.config import DataConfig
from argenseg_jax.data import image_codec, transforms
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.parsing import (
  as_text,
  digest,
  parse_json,
  read_file,
)
from argenseg_jax.data.sources.sample import Option, Sample
from argenseg_jax.data.sources.tfds_records import (
  Shards,
  TfdsRecords,
  damage_named,
)
from argenseg_jax.runtime.paths import as_path

# Beside TFDS' own files: where the records came from, and their digests.
NOTE = "source.json"
_FIELDS = ("meta", "images", "seg_masks")
_PLAIN = ("dataset", "request", "description", "target", "kind", "where")


class Resizing(NamedTuple):
  """How images were resized before they were stored."""

  image_side: int
  resize: transforms.Backend
  pad_square: bool

  @classmethod
  def of(cls, config: DataConfig) -> "Resizing":
    return cls(config.image_side, config.resize, config.pad_square)


class ArrayRecordSource:
  """A split of a folder that `array_record_writer.build` wrote.

  Args:
    path: the folder that holds dataset_info.json.
    split: its name.
  """

  has_turns = True
  notes = ()

  def __init__(self, path: str | pathlib.Path, split: str):
    self.path = as_path(path)
    note = self.path / NOTE
    raw = read_file(note, "give a folder that `argenseg data build` wrote")
    self._records = _Records(self.path, split)
    splits = parse_json(raw, str(note), dict)
    try:
      self.has_options = bool(splits[split]["options"])
      resizing = splits[split].get("resizing")
      self.resizing = resizing and Resizing(**resizing)
    except (AttributeError, KeyError, TypeError) as error:
      raise DataError(f"{note} says nothing of split {split!r}.") from error
    self.fingerprint = digest(raw, split)

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "ArrayRecordSource":
    return cls(path, split)

  @property
  def files(self) -> list[pathlib.Path]:
    """The shards, in order."""
    return self._records.files

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Sample:
    return decode(self._records[index], index)


class _Records(TfdsRecords):
  """Records of `encode`, parsed without the detour that TFDS takes."""

  @property
  def files(self) -> list[pathlib.Path]:
    return sorted(self._path.glob(f"*-{self._split}.array_record-*"))

  @functools.cached_property
  def _records(self):
    from tensorflow_datasets.proto import tf_example_pb2  # Slow to import.

    names, lengths = [str(f) for f in self.files], self._counts[self._split]
    if len(names) != len(lengths):
      raise DataError(
        f"{self._path} has {len(names)} files of split {self._split!r}, its "
        f"dataset_info.json names {len(lengths)}; copy them all."
      )
    made: Any = tf_example_pb2  # Its classes are made when it is imported.
    self._parse = made.Example.FromString
    return Shards(names, lengths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    with damage_named(self._path, index):
      raw = self._records[index]
      feature = self._parse(raw).features.feature
      meta, *lists = (feature[name].bytes_list.value for name in _FIELDS)
      return dict(zip(_FIELDS, (meta[0], *lists), strict=True))


def require_fitting(source: ArrayRecordSource, config: DataConfig) -> None:
  """Raises DataError where stored images are not what rows are to hold."""
  stored, wanted = source.resizing, Resizing.of(config)
  if stored is None or not config.max_images:
    return
  if stored != wanted or config.jpeg_quality:
    raise DataError(
      f"{source.path} was built with --resize_pictures for {_keys(stored)}, "
      f"but the config has {_keys(wanted)}, "
      f"data.jpeg_quality={config.jpeg_quality}; build it again."
    )


def _keys(resizing: Resizing) -> str:
  return ", ".join(f"data.{k}={v}" for k, v in resizing._asdict().items())


def encode(sample: Sample, resizing: Resizing | None = None) -> dict[str, Any]:
  """A sample as a record; masks become PNGs, upright as images are shown.

  Args:
    sample: what to store.
    resizing: store the resized pixels of images, not their own bytes.

  Raises:
    DataError: an image or mask cannot be read, or they differ in size.
  """
  if sample.resized:
    raise DataError(
      f"{sample.where}: its images are resized already; pack the source that "
      "they came from."
    )
  pixels = [sample.load_image(i) for i in range(len(sample.images))]
  if len(pixels) == 1:
    sample = sample.sized(pixels[0].shape[:2])
  chosen = [sample.choose(i) for i in range(len(sample.options))]
  seg_masks = []
  for holder in (sample, *chosen):
    for number, stored in enumerate(holder.seg_masks):
      if sample.target == "picture":
        image_codec.decode_image(stored, where=sample.where)
        seg_masks.append(image_codec.read_encoded(stored, sample.where)[0])
      else:
        seg_masks.append(_png(holder.load_seg_mask(number)))
  ignores = [sample.load_ignore(i) for i in range(len(sample.ignores))]
  seg_masks += [_png(ignore) for ignore in ignores if ignore is not None]
  size = pixels[0].shape[:2] if len(pixels) == 1 else sample.size
  meta = {name: getattr(sample, name) for name in _PLAIN} | {
    "expressions": sample.expressions,
    "conversation": sample.conversation,
    "answers": sample.answers,
    "options": [option.expressions for option in sample.options],
    "size": None if size is None else [int(n) for n in size],
    "ignores": [ignore is not None for ignore in ignores],
    "image_keys": [str(key) for key in sample.image_keys],
    "resized": resizing is not None,
    "upright": True,
  }
  if resizing is None:
    images = [
      image_codec.read_encoded(stored, sample.where)[0]
      for stored in sample.images
    ]
  else:
    images = [_resized(image, resizing) for image in pixels]
  return {
    "meta": json.dumps(meta),
    "images": images,
    "seg_masks": seg_masks,
  }


def _png(seg_mask: Bool[np.ndarray, "h w"]) -> bytes:
  _, png = cv2.imencode(".png", seg_mask.astype(np.uint8) * np.uint8(255))
  return png.tobytes()


def _resized(pixels: np.ndarray, resizing: Resizing) -> bytes:
  return image_codec.encode_pixels(
    transforms.resize_image(
      pixels,
      resizing.image_side,
      backend=resizing.resize,
      pad_square=resizing.pad_square,
    )
  )


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
  options, ignores = meta["options"], meta.get("ignores", [])
  seg_masks, ignored = _parted(seg_masks, sum(map(bool, ignores)))
  stored, optional = _parted(seg_masks, len(options))
  left = iter(ignored)
  return Sample(
    **{name: meta[name] for name in _PLAIN},
    index=index,
    images=tuple(record["images"]),
    seg_masks=stored,
    expressions=tuple(meta["expressions"]),
    conversation=tuple(meta["conversation"]),
    answers=tuple(meta.get("answers", ())),
    options=tuple(
      Option(tuple(wordings), seg_mask)
      for wordings, seg_mask in zip(options, optional, strict=True)
    ),
    size=meta["size"] and tuple(meta["size"]),
    ignores=tuple(next(left) if given else None for given in ignores),
    image_keys=tuple(meta["image_keys"]),
    resized=meta.get("resized", False),
    upright=meta.get("upright", False),
  )


def _parted(values: tuple, last: int) -> tuple[tuple, tuple]:
  """All but the last values, and those."""
  split = len(values) - last
  return values[:split], values[split:]
