"""From every way to store a mask to pixels."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float
from pycocotools import mask as coco

from argenseg_jax.data import image_codec, mask_image, mask_values
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.mask_values import Reading
from argenseg_jax.runtime import paths

_MAX_SHIFT = 40  # Of a run length's bits; no image has so many pixels.


@dataclasses.dataclass(frozen=True)
class Union:
  """Several stored masks as one: every pixel that any of them holds."""

  parts: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
  """Some values of an image that marks many objects or classes.

  Attributes:
    stored: the encoded image; in color, a pixel means R + 256 G + 65536 B.
    values: those that belong to the mask.
    color: whether to read it so.
  """

  stored: Any
  values: tuple[int, ...]
  color: bool = False


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Drawn polygons in order, later ones over earlier ones.

  Attributes:
    polygons: of x, y pairs in pixels.
    fills: for each polygon, whether it adds to the mask or cuts out of it.
  """

  polygons: tuple[tuple[tuple[float, float], ...], ...]
  fills: tuple[bool, ...]


def needs_size(stored: Any) -> bool:
  """Whether the size of the image must be known to decode this mask."""
  if isinstance(stored, Union):
    return any(map(needs_size, stored.parts))
  return isinstance(stored, (list, Shapes))


def load_seg_mask(
  stored: Any, *, size: tuple[int, int] | None = None, where: str = ""
) -> Bool[np.ndarray, "h w"]:
  """Decodes one mask; arguments and errors as `read`."""
  return read(stored, size=size, where=where).seg_mask


def read(
  stored: Any, *, size: tuple[int, int] | None = None, where: str = ""
) -> Reading:
  """Decodes one mask and says how it was stored.

  Args:
    stored: an encoded image or array (bytes or path, see `mask_image`), a COCO
      run-length dict, a list of COCO polygons, pixels (see `mask_values`), or
      one of the classes of this module.
    size: height and width; polygons need it, and others must agree with it.
    where: the record, for messages.

  Raises:
    DataError: not a mask, one that could mean several things, or one of
      another size.
  """
  if isinstance(stored, np.ndarray):
    reading = mask_values.read(stored, where=where)
  elif isinstance(stored, (bytes, str, paths.Path)):
    reading = mask_image.read(stored, where=where)
  elif isinstance(stored, Union):
    reading = _union(stored.parts, size, where)
  elif isinstance(stored, Segment):
    ids = mask_image.read_ids(stored.stored, color=stored.color, where=where)
    reading = Reading(np.isin(ids, stored.values), "label map")
  elif isinstance(stored, Shapes):
    reading = Reading(_draw(stored, size, where), "polygons")
  elif isinstance(stored, dict):
    reading = Reading(_from_run_lengths(stored, where), "run lengths")
  elif isinstance(stored, list):
    reading = _from_polygons(stored, size, where)
  else:
    raise DataError(f"{where}: a mask cannot be a {type(stored).__name__}.")
  if size is not None and reading.seg_mask.shape != tuple(size):
    height, width = reading.seg_mask.shape
    raise DataError(
      f"{where}: the mask has {width}x{height} pixels but the image "
      f"{size[1]}x{size[0]}."
    )
  return reading


def _union(
  parts: Sequence[Any], size: tuple[int, int] | None, where: str
) -> Reading:
  readings = [read(part, size=size, where=where) for part in parts]
  shapes = sorted({reading.seg_mask.shape for reading in readings})
  if len(shapes) != 1:
    raise DataError(f"{where}: its masks have different sizes: {shapes}.")
  return Reading(
    np.any([reading.seg_mask for reading in readings], axis=0),
    readings[0].kind,
    readings[0].found,
    left_out=sum(reading.left_out for reading in readings),
  )


def _draw(
  stored: Shapes, size: tuple[int, int] | None, where: str
) -> Bool[np.ndarray, "h w"]:
  if size is None:
    raise DataError(f"{where}: a polygon needs the size of its image.")
  _check_size(size, where)
  if stored.polygons:
    _require_pixels(stored.polygons, size, where)
  pixels = np.zeros(size, np.uint8)
  for polygon, fill in zip(stored.polygons, stored.fills, strict=True):
    points = np.array(polygon, np.float64)
    _check_outline(points, size, where)
    outline = [points.astype(np.int32)]
    cv2.fillPoly(pixels, outline, int(fill))
    cv2.polylines(pixels, outline, True, int(fill), 1)
  return pixels.view(np.bool_)


def _from_run_lengths(
  stored: Mapping[str, Any], where: str
) -> Bool[np.ndarray, "h w"]:
  try:
    height, width = map(whole_number, stored["size"])
    counts = stored["counts"]
    if not isinstance(counts, (str, bytes)):
      counts = list(counts)
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise DataError(
      f'{where}: a run-length mask needs "size" [height, width] and "counts".'
    ) from error
  _check_size((height, width), where)
  if isinstance(counts, str):
    counts = counts.encode("ascii", "replace")
  if isinstance(counts, bytes):
    runs = _read_runs(counts, where)
  else:
    try:
      runs = [whole_number(n) for n in counts]
    except (TypeError, ValueError, OverflowError) as error:
      raise DataError(
        f"{where}: a run length of the mask is no whole number ({error})."
      ) from error
  if any(n < 0 for n in runs) or sum(runs) != height * width:
    raise DataError(
      f"{where}: the run lengths do not add up to {height}x{width} pixels."
    )
  values = np.arange(len(runs)) % 2 == 1
  flat = np.repeat(values, runs)
  return np.ascontiguousarray(flat.reshape(width, height).T)


def whole_number(value: Any) -> int:
  """An int from what JSON's writers make of one: 7, 7.0, "7".

  Raises:
    TypeError, ValueError: it is none; true and false are none.
  """
  if isinstance(value, (bool, np.bool_)):
    raise TypeError(f"{value} is no number")
  if isinstance(value, str):
    text = value.strip()
    if not text.removeprefix("-").isdecimal() or len(text) > 19:
      raise ValueError(f"{value[:40]!r} is no whole number")
    return int(text)
  if isinstance(value, float):
    if not value.is_integer():  # NaN and infinity are not, either.
      raise ValueError(f"{value} is no whole number")
    return int(value)
  return operator.index(value)


def run_lengths(seg_mask: np.ndarray) -> dict[str, Any]:
  """A mask, bool [h w], as COCO's compressed run lengths, JSON-ready."""
  # Its annotation says str; the counts are bytes.
  coded: Any = coco.encode(np.asfortranarray(seg_mask.astype(np.uint8)))
  return {
    "size": list(seg_mask.shape),
    "counts": coded["counts"].decode("ascii"),
  }


def overlaps(
  masks: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> np.ndarray:
  """float [masks others]: IoU of each with each, of `run_lengths` of one size;
  0 where both are empty."""
  # Its annotations know run lengths as bytes only.
  rows: Any = list(masks)
  columns: Any = list(others)
  found = coco.iou(rows, columns, [0] * len(others))
  return np.nan_to_num(np.asarray(found)).reshape(len(masks), len(others))


def _read_runs(counts: bytes, where: str) -> list[int]:
  """Run lengths from COCO's text: 5 bits a character, low ones first, and from
  the fourth run on the difference to the run before the last.

  Read here because pycocotools writes past its buffer when they are wrong.
  """
  runs: list[int] = []
  value, shift = 0, 0
  for character in counts:
    chunk = character - 48
    if not 0 <= chunk < 64:
      raise DataError(f"{where}: the run-length text of the mask is broken.")
    if shift > _MAX_SHIFT:
      raise DataError(f"{where}: a run length of the mask is too large.")
    value |= (chunk & 0x1F) << shift
    shift += 5
    if not chunk & 0x20:  # The last character of this run.
      if chunk & 0x10:
        value -= 1 << shift
      runs.append(value + (runs[-2] if len(runs) > 2 else 0))
      value, shift = 0, 0
  if shift:
    raise DataError(f"{where}: the run-length text of the mask is broken.")
  return runs


def _from_polygons(
  stored: list, size: tuple[int, int] | None, where: str
) -> Reading:
  """Parts with fewer than three points mark nothing and are left out."""
  if size is None:
    raise DataError(f"{where}: a polygon needs the size of its image.")
  given = stored if stored and isinstance(stored[0], list) else [stored]
  if not all(map(_is_polygon, given)):
    raise DataError(
      f"{where}: a polygon is a list of at least three x, y pairs."
    )
  polygons = [polygon for polygon in given if len(polygon) >= 6]
  if not polygons:
    raise DataError(f"{where}: no part of its polygon has three x, y pairs.")
  _check_size(size, where)
  _require_pixels(polygons, size, where)
  for polygon in polygons:
    try:
      points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError as error:
      raise DataError(f"{where}: a polygon's corner is too far out.") from error
    _check_outline(points, size, where)
  height, width = size
  parts = coco.frPyObjects(polygons, height, width)
  seg_mask = _from_run_lengths(coco.merge(parts), where)
  return Reading(seg_mask, "polygons", left_out=len(given) - len(polygons))


def _is_polygon(value: Any) -> bool:
  return (
    isinstance(value, list)
    and len(value) % 2 == 0
    and all(
      isinstance(n, (int, float)) and not isinstance(n, bool) for n in value
    )
  )


def _check_size(size: tuple[int, int], where: str) -> None:
  """Refuses a size before memory is taken for it."""
  height, width = size
  if height < 1 or width < 1 or height * width > image_codec.MAX_PIXELS:
    raise DataError(
      f"{where}: the height and width of a mask must be above 0, and their "
      f"product at most {image_codec.MAX_PIXELS}."
    )


def _require_pixels(
  polygons: Sequence[Any], size: tuple[int, int], where: str
) -> None:
  """Refuses corners in shares of the image (as YOLO writes them): they would
  mark a single pixel."""
  if max(size) > 1 and all(0 <= n <= 1 for p in polygons for n in np.ravel(p)):
    raise DataError(
      f"{where}: all corners of its polygon lie between 0 and 1; give them in "
      "pixels, not in shares of the image."
    )


def _check_outline(
  points: Float[np.ndarray, "n 2"], size: tuple[int, int], where: str
) -> None:
  """Refuses what pycocotools and OpenCV would draw far outside, or for ever:
  they keep every point of an outline, and compute in 32 bits."""
  height, width = size
  if not np.all(np.abs(points) <= 2 * max(height, width) + 100):
    raise DataError(
      f"{where}: a polygon's corner is far outside its {width}x{height} "
      "image, or no number."
    )
  steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
  if steps.sum() > 4 * height * width + 1000 * (height + width):
    raise DataError(
      f"{where}: a polygon's outline is longer than its image has room for."
    )
