"""ReasonSeg as LISA distributes it: one json beside each image."""

import pathlib
from typing import Any, NamedTuple

import cv2
import numpy as np

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.parsing import (
  digest,
  nearest,
  parse_json,
  read_file,
  required_text,
)
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.runtime import paths

_LABELS = ("target", "ignore", "flag")


class _Shape(NamedTuple):
  area: float
  points: tuple[tuple[float, float], ...]
  is_target: bool


class ReasonSegSource:
  """The `name.json` files of a split's folder, each beside its `name.jpg`.

  A json holds "text" (wordings) and "shapes" with "label" ("target", "ignore",
  "flag") and "points". Smaller shapes lie on larger ones. What is "ignore"
  is no part of the object, and metrics leave it out (the official rule).
  Shapes of fewer than three points mark nothing.

  Args:
    path: the folder of a split, or the one above it.
    split: "train", "val", "test".
  """

  has_options = False
  has_turns = False
  notes = ()

  def __init__(self, path: str | pathlib.Path, split: str):
    folder = paths.as_path(path)
    self.path = folder / split if (folder / split).is_dir() else folder
    self._files = sorted(self.path.glob("*.json"))
    if not self._files:
      raise DataError(
        f"{self.path} contains no json files; give ReasonSeg's folder and one "
        "of its splits."
      )
    sizes = "".join(f"{f.name} {paths.size(f)}\n" for f in self._files)
    self.fingerprint = digest(sizes)

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "ReasonSegSource":
    return cls(path, split)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Sample:
    file = self._files[index]
    raw = read_file(file, "it was there when the split was opened")
    record = parse_json(raw, str(file), dict, strict=True)
    texts, shapes = record.get("text"), record.get("shapes")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not isinstance(shapes, list):
      raise DataError(f'{file} needs "text" and "shapes", two lists.')
    drawn = [_shape(shape, file) for shape in shapes]
    drawn = sorted(
      (shape for shape in drawn if shape is not None), key=lambda s: -s.area
    )
    polygons = tuple(shape.points for shape in drawn)
    targets = tuple(shape.is_target for shape in drawn)
    ignored = tuple(not is_target for is_target in targets)
    ignore = masks.Shapes(polygons, ignored) if any(ignored) else None
    image = file.with_suffix(".jpg")
    return Sample(
      index=index,
      dataset="reason_seg",
      images=(image,),
      seg_masks=(masks.Shapes(polygons, targets),),
      ignores=(ignore,),
      expressions=tuple(
        required_text(text, str(file), "expression") for text in texts
      ),
      request="reasoning",
      kind="reasoning",
      image_keys=(str(image),),
      where=str(file),
    )


def _shape(shape: Any, file: paths.Path) -> _Shape | None:
  """A shape that marks something; None for "flag" and too few points."""
  try:
    label = shape["label"].lower()
    points = tuple((float(x), float(y)) for x, y in shape["points"])
  except (
    *(KeyError, TypeError, ValueError),
    *(OverflowError, AttributeError),
  ) as error:
    raise DataError(
      f'{file} has a shape without "label" and "points" [[x, y], ...].'
    ) from error
  meant = next((name for name in _LABELS if name in label), "")
  if not meant and (near := nearest(label, _LABELS)):
    raise DataError(
      f"{file} has a shape labeled {label!r}; did you mean {near!r}?"
    )
  if meant == "flag" or len(points) < 3:
    return None
  area = cv2.contourArea(np.array(points, np.float32))
  return _Shape(area, points, meant != "ignore")
