"""Requests by a point or a box, in words or drawn on the image."""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from argenseg_jax.data.boxes import FULL, mask_box
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.parsing import digest
from argenseg_jax.data.sources.sample import Sample, Source

_RED = (255, 0, 0)
_THICKNESS = 0.01  # Of the image's longer side; at least 2 pixels.


class Interactive:
  """Any source of single masks, asked for by a point or a box of each.

  Args:
    source: its expressions are left out.
    how: "point", "box", "drawn_point" or "drawn_box".
  """

  def __init__(self, source: Source, how: str):
    self._source = source
    self._how = how
    self.fingerprint = digest(source.fingerprint, how)
    self.has_options = self.has_turns = False
    self.notes = source.notes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Sample:
    sample = self._source[index]
    if len(sample.images) != 1 or len(sample.seg_masks) != 1:
      raise DataError(
        f"{sample.where} needs one image and one mask to be asked for by a "
        f"{self._how.removeprefix('drawn_')}."
      )
    seg_mask = sample.load_seg_mask()
    box = mask_box(seg_mask)
    if box is None:
      raise DataError(f"{sample.where} has a mask without a single pixel.")
    place = mask_point(seg_mask) if self._how.endswith("point") else box
    asked = dataclasses.replace(
      sample, conversation=(), expressions=(place_text(place),)
    )
    if not self._how.startswith("drawn"):
      return dataclasses.replace(asked, request=self._how)
    marked = draw_mark(sample.load_image(), place)
    _, png = cv2.imencode(".png", marked[..., ::-1])
    return dataclasses.replace(
      asked,
      request="drawn",
      images=(png.tobytes(),),  # As shown.
      size=seg_mask.shape,
      seg_masks=(seg_mask,),
      ignores=(sample.load_ignore(),),
      frame=None,
      upright=True,
      image_keys=((sample.image_keys[0], self._how, place),),
    )


def mask_point(seg_mask: Bool[np.ndarray, "h w"]) -> tuple[float, float]:
  """The pixel farthest inside a mask, (x, y) in shares of the image."""
  inside = cv2.distanceTransform(
    np.pad(seg_mask.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
  )[1:-1, 1:-1]
  row, column = np.unravel_index(inside.argmax(), inside.shape)
  height, width = seg_mask.shape
  return float((column + 0.5) / width), float((row + 0.5) / height)


def place_text(place: tuple[float, ...]) -> str:
  """A point or box as requests and answers write it."""
  return f"[[{', '.join(str(round(FULL * share)) for share in place)}]]"


def draw_mark(
  image: UInt8[np.ndarray, "h w 3"], place: tuple[float, ...]
) -> UInt8[np.ndarray, "h w 3"]:
  """A copy of an image with a red dot, or the red outline of a box.

  Args:
    image: RGB.
    place: (x, y) or (x1, y1, x2, y2) in shares of the image.
  """
  marked = np.ascontiguousarray(image).copy()
  height, width = image.shape[:2]
  thick = max(2, round(_THICKNESS * max(height, width)))
  corners = [
    (min(int(x * width), width - 1), min(int(y * height), height - 1))
    for x, y in zip(place[::2], place[1::2], strict=True)
  ]
  if len(corners) == 1:
    cv2.circle(marked, corners[0], thick, _RED, -1)
  else:
    first, second = corners
    cv2.rectangle(marked, first, second, _RED, thick)
  return marked
