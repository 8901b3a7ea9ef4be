"""From every way to store a mask to pixels."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from pycocotools import mask as coco

from argenseg_jax.data import transforms
from argenseg_jax.data.errors import DataError

_MAX_SHIFT = 40  # Of a run length's bits; no picture has so many pixels.


@dataclasses.dataclass(frozen=True)
class Union:
  """Several stored masks as one: every pixel that any of them holds."""

  parts: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
  """Some values of a picture that marks many objects or classes.

  Attributes:
    stored: the encoded picture; in colour, a pixel means R + 256 G + 65536 B.
    values: those that belong to the mask.
    colour: whether to read it so.
  """

  stored: Any
  values: tuple[int, ...]
  colour: bool = False


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
  """Whether the size of the picture must be known to decode this mask."""
  if isinstance(stored, Union):
    return any(map(needs_size, stored.parts))
  return isinstance(stored, (list, Shapes))


def load_seg_mask(
  stored: Any, *, size: tuple[int, int] | None = None, where: str = ""
) -> UInt8[np.ndarray, "h w"]:
  """Decodes one mask.

  Args:
    stored: an encoded picture (bytes or path; any value but 0 is the object),
      a COCO run-length dict, a list of COCO polygons, pixels, or one of the
      classes of this module.
    size: height and width; polygons need it, and others must agree with it.
    where: the record, for messages.

  Returns:
    The mask with its values as stored: 0/1, or 0/255 for most pictures.

  Raises:
    DataError: not a mask, or one of another size.
  """
  if isinstance(stored, np.ndarray):
    pixels = stored
  elif isinstance(stored, (bytes, str, pathlib.PurePath)):
    pixels = transforms.decode_seg_mask(stored, where=where)
  elif isinstance(stored, Union):
    pixels = _union(stored.parts, size, where)
  elif isinstance(stored, Segment):
    ids = decode_ids(stored.stored, colour=stored.colour, where=where)
    pixels = np.isin(ids, stored.values).astype(np.uint8)
  elif isinstance(stored, Shapes):
    pixels = _draw(stored, size, where)
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


def decode_ids(
  stored: transforms.Encoded, *, colour: bool, where: str = ""
) -> np.ndarray:
  """The values of a `Segment`'s picture, [h w]."""
  if not colour:
    return transforms.decode_seg_mask(stored, where=where)
  rgb = transforms.decode_image(stored, where=where).astype(np.int32)
  return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def _union(
  parts: Sequence[Any], size: tuple[int, int] | None, where: str
) -> np.ndarray:
  loaded = [load_seg_mask(part, size=size, where=where) > 0 for part in parts]
  shapes = sorted({pixels.shape for pixels in loaded})
  if len(shapes) != 1:
    raise DataError(f"{where}: its masks have different sizes: {shapes}.")
  return np.any(loaded, axis=0).astype(np.uint8)


def _draw(
  stored: Shapes, size: tuple[int, int] | None, where: str
) -> np.ndarray:
  if size is None:
    raise DataError(f"{where}: a polygon needs the size of its picture.")
  _check_size(size, where)
  pixels = np.zeros(size, np.uint8)
  for polygon, fill in zip(stored.polygons, stored.fills, strict=True):
    points = np.array(polygon, np.float64)
    _check_outline(points, size, where)
    points = points.astype(np.int32)[None]
    cv2.fillPoly(pixels, points, int(fill))
    cv2.polylines(pixels, points, True, int(fill), 1)
  return pixels


def _from_run_lengths(stored: dict, where: str) -> np.ndarray:
  try:
    height, width = (int(n) for n in stored["size"])
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
  runs = _read_runs(counts, where) if isinstance(counts, bytes) else counts
  if any(not isinstance(n, int) or n < 0 for n in runs) or (
    sum(runs) != height * width
  ):
    raise DataError(
      f"{where}: the run lengths do not add up to {height}x{width} pixels."
    )
  values = np.arange(len(runs), dtype=np.uint8) % 2
  flat = np.repeat(values, runs)
  return np.ascontiguousarray(flat.reshape(width, height).T)


def run_lengths(seg_mask: np.ndarray) -> dict[str, Any]:
  """A mask, bool [h w], as COCO's compressed run lengths, JSON-ready."""
  coded = coco.encode(np.asfortranarray(seg_mask.astype(np.uint8)))
  return {
    "size": list(seg_mask.shape),
    "counts": coded["counts"].decode("ascii"),
  }


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
) -> np.ndarray:
  if size is None:
    raise DataError(f"{where}: a polygon needs the size of its picture.")
  polygons = stored if stored and isinstance(stored[0], list) else [stored]
  if any(
    not isinstance(p, list)
    or len(p) < 6
    or len(p) % 2
    or not all(isinstance(n, (int, float)) for n in p)
    for p in polygons
  ):
    raise DataError(
      f"{where}: a polygon is a list of at least three x, y pairs."
    )
  _check_size(size, where)
  for polygon in polygons:
    try:
      points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError as error:
      raise DataError(f"{where}: a polygon's corner is too far out.") from error
    _check_outline(points, size, where)
  height, width = size
  parts = coco.frPyObjects(polygons, height, width)
  return _from_run_lengths(coco.merge(parts), where)


def _check_size(size: tuple[int, int], where: str) -> None:
  """Refuses a size before memory is taken for it."""
  height, width = size
  if height < 1 or width < 1 or height * width > transforms.MAX_PIXELS:
    raise DataError(
      f"{where}: the height and width of a mask must be above 0, and their "
      f"product at most {transforms.MAX_PIXELS}."
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
      "picture, or no number."
    )
  steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
  if steps.sum() > 4 * height * width + 1000 * (height + width):
    raise DataError(
      f"{where}: a polygon's outline is longer than its picture has room for."
    )
