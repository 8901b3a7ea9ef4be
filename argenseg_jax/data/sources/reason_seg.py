"""ReasonSeg as LISA distributes it: one json beside each picture."""

import json
import pathlib
from typing import Any

import cv2
import numpy as np

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import Sample, digest, read_file
from argenseg_jax.runtime import paths


class ReasonSegSource:
  """The `name.json` files of a split's folder, each beside its `name.jpg`.

  A json holds "text" (wordings) and "shapes" with "label" ("target", "ignore",
  "flag") and "points". Smaller shapes lie on larger ones; what is "ignore"
  counts as background.

  Args:
    path: the folder of a split, or the one above it.
    split: "train", "val", "test".
  """

  def __init__(self, path: str | pathlib.Path, split: str):
    path = paths.as_path(path)
    self.path = path / split if (path / split).is_dir() else path
    self._files = sorted(self.path.glob("*.json"))
    if not self._files:
      raise DataError(
        f"{self.path} holds no json files; give ReasonSeg's folder and one of "
        "its splits."
      )
    sizes = "".join(f"{f.name} {paths.size(f)}\n" for f in self._files)
    self.fingerprint = digest(sizes)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Sample:
    file = self._files[index]
    record = _read(file)
    texts = record.get("text")
    texts = [texts] if isinstance(texts, str) else texts
    shapes = record.get("shapes")
    if not isinstance(texts, list) or not isinstance(shapes, list):
      raise DataError(f'{file} needs "text" and "shapes", two lists.')
    drawn = []
    for shape in shapes:
      try:
        label = str(shape["label"]).lower()
        points = tuple((float(x), float(y)) for x, y in shape["points"])
      except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
          f'{file} has a shape without "label" and "points" [[x, y], ...].'
        ) from error
      if "flag" not in label and len(points) > 2:
        area = cv2.contourArea(np.array(points, np.float32))
        drawn.append((area, points, "ignore" not in label))
    drawn.sort(key=lambda shape: -shape[0])
    image = file.with_suffix(".jpg")
    return Sample(
      index=index,
      dataset="reason_seg",
      images=(image,),
      seg_masks=(
        masks.Shapes(tuple(d[1] for d in drawn), tuple(d[2] for d in drawn)),
      ),
      expressions=tuple(map(str, texts)),
      request="reasoning",
      kind="reasoning",
      image_keys=(str(image),),
      where=str(file),
    )


def _read(file: paths.Path) -> dict[str, Any]:
  raw = read_file(file, "it was there when the split was opened")
  for encoding in (
    "utf-8",
    "cp1252",
  ):  # Some of the released files are not UTF-8.
    try:
      record = json.loads(raw.decode(encoding))
      break
    except UnicodeDecodeError:
      continue
    except (ValueError, RecursionError) as error:
      raise DataError(f"{file} is not JSON: {error}.") from error
  else:
    raise DataError(f"{file} is not UTF-8 text.")
  if not isinstance(record, dict):
    raise DataError(f"{file} is not a JSON object.")
  return record
