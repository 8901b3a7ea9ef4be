"""Boxes: of a mask, and as answers write them."""

import re

import numpy as np

# [x1, y1, x2, y2] or (x1, y1), (x2, y2), numbers with or without a point.
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_BOX = re.compile(
  rf"[\[(]{_NUMBER},{_NUMBER}(?:\)\s*,?\s*\(|\]\s*,?\s*\[|,)"
  rf"{_NUMBER},{_NUMBER}[\])]"
)
FULL = 1000  # InternVL's unit: an image is 1000 x 1000, whatever its size.


def mask_box(seg_mask: np.ndarray) -> tuple[float, ...] | None:
  """The tight box (x1, y1, x2, y2) of a bool [h w] mask in shares of the
  image's width and height, ends exclusive; None for an empty mask."""
  rows = np.flatnonzero(seg_mask.any(1))
  columns = np.flatnonzero(seg_mask.any(0))
  if not rows.size:
    return None
  height, width = seg_mask.shape
  return (
    float(columns[0] / width),
    float(rows[0] / height),
    float((columns[-1] + 1) / width),
    float((rows[-1] + 1) / height),
  )


def text_box(text: str) -> tuple[float, ...] | None:
  """The first box of a text as shares of the image, corners put in order.

  Numbers are thousandths of the image as InternVL writes them,
  `<box>[[x1, y1, x2, y2]]</box>`, or shares of it where none is above 1 and
  one has a point.
  """
  found = _BOX.search(text)
  if found is None:
    return None
  words = found.groups()
  values = [float(word) for word in words]
  is_share = max(values) <= 1 and any("." in word for word in words)
  x1, y1, x2, y2 = (v if is_share else v / FULL for v in values)
  return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def box_iou(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> float:
  """Intersection over union of two boxes; 0 where one is missing."""
  if a is None or b is None:
    return 0.0
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  intersection = max(width, 0.0) * max(height, 0.0)
  union = _area(a) + _area(b) - intersection
  return intersection / union if union > 0 else 0.0


def _area(box: tuple[float, ...]) -> float:
  return (box[2] - box[0]) * (box[3] - box[1])
