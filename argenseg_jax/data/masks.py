"""From every way to store a mask to pixels."""

import pathlib
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pycocotools import mask as coco

from argenseg_jax.data import transforms
from argenseg_jax.data.errors import DataError


def load_seg_mask(
  stored: Any, *, size: tuple[int, int] | None = None, where: str = ""
) -> UInt8[np.ndarray, "h w"]:
  """Decodes one mask.

  Args:
    stored: an encoded picture (bytes or path; any value but 0 is the object),
      a COCO run-length dict, or a list of COCO polygons.
    size: height and width; polygons need it, and others must agree with it.
    where: the record, for messages.

  Returns:
    The mask with its values as stored: 0/1, or 0/255 for most pictures.

  Raises:
    DataError: not a mask, or one of another size.
  """
  if isinstance(stored, (bytes, str, pathlib.Path)):
    pixels = transforms.decode_seg_mask(stored, where=where)
  elif isinstance(stored, dict):
    pixels = _from_run_lengths(stored, where)
  elif isinstance(stored, list):
    pixels = _from_polygons(stored, size, where)
  else:
    raise DataError(f"{where}: a mask cannot be a {type(stored).__name__}.")
  if size is not None and pixels.shape != tuple(size):
    raise DataError(
      f"{where}: the mask has {pixels.shape[1]}x{pixels.shape[0]} pixels but "
      f"the picture {size[1]}x{size[0]}."
    )
  return pixels


def _from_run_lengths(stored: dict, where: str) -> np.ndarray:
  try:
    height, width = (int(n) for n in stored["size"])
    counts = stored["counts"]
  except (KeyError, TypeError, ValueError) as error:
    raise DataError(
      f'{where}: a run-length mask needs "size" [height, width] and "counts".'
    ) from error
  if isinstance(counts, list):
    if any(not isinstance(n, int) or n < 0 for n in counts) or (
      sum(counts) != height * width
    ):
      raise DataError(
        f"{where}: the run lengths do not add up to {height}x{width} pixels."
      )
    values = np.arange(len(counts)) % 2
    flat = np.repeat(values.astype(np.uint8), counts)
    return np.ascontiguousarray(flat.reshape(width, height).T)
  if isinstance(counts, str):
    counts = counts.encode("ascii", "replace")
  _check_compressed(counts, height * width, where)
  return coco.decode({"size": [height, width], "counts": counts})


def _check_compressed(counts: bytes, pixels: int, where: str) -> None:
  """pycocotools writes past its buffer when the runs are too long."""
  runs: list[int] = []
  place = 0
  while place < len(counts):
    value, shift, more = 0, 0, True
    while more:
      if place >= len(counts) or not 48 <= counts[place] < 112:
        raise DataError(f"{where}: the run-length text of the mask is broken.")
      chunk = counts[place] - 48
      value |= (chunk & 0x1F) << shift
      more = bool(chunk & 0x20)
      place += 1
      shift += 5
      if not more and chunk & 0x10:
        value -= 1 << shift
    if len(runs) > 2:
      value += runs[-2]
    runs.append(value)
  if min(runs, default=0) < 0 or sum(runs) != pixels:
    raise DataError(
      f"{where}: the run lengths do not add up to {pixels} pixels."
    )


def _from_polygons(
  stored: list, size: tuple[int, int] | None, where: str
) -> np.ndarray:
  if size is None:
    raise DataError(f"{where}: a polygon needs the size of its picture.")
  polygons = stored if stored and isinstance(stored[0], list) else [stored]
  if any(
    len(p) < 6 or len(p) % 2 or not all(isinstance(n, (int, float)) for n in p)
    for p in polygons
  ):
    raise DataError(
      f"{where}: a polygon is a list of at least three x, y pairs."
    )
  height, width = size
  parts = coco.frPyObjects(polygons, height, width)
  return coco.decode(coco.merge(parts))
