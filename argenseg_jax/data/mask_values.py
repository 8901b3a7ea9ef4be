"""From the numbers of a stored mask to two values, or to a sentence.

The one place that says which pixels of somebody's mask are the object. A mask
is never guessed at: what could mean something else is refused, with the values
that were found.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Shaped

from argenseg_jax.data.errors import DataError
from argenseg_jax.types import MASK_THRESHOLD

_REMEDY = (
  "store one mask a file, black with the object in white, with nothing between"
)
_SCALES = (1, 255, 65535)  # What soft masks may reach up to.
_NEAR_END = 0.1  # Of the scale: both ends of a soft mask must lie so near.
_MIDDLE = 0.25  # Of the scale: gray levels farther from both ends are "middle".
_MANY = 24  # Levels of a smooth mask, whose ends may be areas of 1 or 254, too.
_FEW = 3  # Levels that are no soft edge; up to twice as many are looked at.
_STRAY = 0.02  # Of the object's pixels: so many middle ones far from both ends.
_SLACK = 4 / 255  # Areas of one level so near to an end are rounding.
_MAX_PARTS = 4  # Colors of the parts of one object; more are a label map.
_IDS_BELOW = 32  # Darker colors are numbers, not colors.
_VOID = (224, 224, 192)  # "Ignore" in the label maps of Pascal VOC.
_LISTED = 8  # Values that a sentence lists.


@dataclasses.dataclass(frozen=True)
class Reading:
  """A stored mask as it was understood.

  Attributes:
    seg_mask: bool [h w]; True is the object.
    kind: how it is stored: "two values", "one value", "soft", "colored",
      "alpha", also "indexed, ..."; or "run lengths", "polygons", "label map".
    found: the values that say so, for people: "0, 255".
    orientation: EXIF's, of the file of the mask itself; already followed.
    left_out: polygon parts with fewer than three points.
  """

  seg_mask: Bool[np.ndarray, "h w"]
  kind: str
  found: str = ""
  orientation: int = 1
  left_out: int = 0


def read(
  values: Shaped[np.ndarray, "..."], *, lossy: bool = False, where: str = ""
) -> Reading:
  """Which pixels of a mask are the object.

  Two values: the higher one. Gray levels between (soft edges, JPEG): those
  above half of the range. Colors on black: all of them. Alpha: where it varies
  and the colors do not.

  Args:
    values: [h w], or [h w c] of 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB,
      alpha) channels; any numbers.
    lossy: whether they come from a format that changes values a little.
    where: the record or file, for messages.

  Raises:
    DataError: it could mean several things; the values are named.
  """
  if values.ndim == 2:
    values = values[..., None]
  if values.ndim != 3 or values.shape[-1] not in (1, 2, 3, 4):
    raise DataError(
      f"{where}: a mask has the shape {list(values.shape)}; use [height, "
      "width]."
    )
  if not values.size:
    raise DataError(f"{where}: a mask has no pixels.")
  if values.dtype.kind not in "buif":
    raise DataError(f"{where}: a mask contains {values.dtype}, not numbers.")
  if values.dtype.kind == "f" and not np.isfinite(values).all():
    raise DataError(f"{where}: a mask contains NaN or infinite numbers.")
  if values.shape[-1] in (2, 4):
    return _of_alpha(values[..., :-1], values[..., -1], lossy, where)
  return _of_colors(values, lossy, where)


def _of_alpha(
  colors: Shaped[np.ndarray, "h w c"],
  alpha: Shaped[np.ndarray, "h w"],
  lossy: bool,
  where: str,
) -> Reading:
  if alpha.min() == alpha.max():
    if not alpha.max():
      raise DataError(
        f"{where}: every pixel of the mask is transparent; {_REMEDY}."
      )
    return _of_colors(colors, lossy, where)
  drawn = _of_gray(alpha, lossy, f"{where}: alpha channel")
  if (colors == colors[0, 0]).all():
    return dataclasses.replace(drawn, kind="alpha")
  try:
    painted = _of_colors(colors, lossy, where)
  except DataError:
    painted = None
  if painted is None or (painted.seg_mask != drawn.seg_mask).any():
    raise DataError(
      f"{where}: the mask's alpha channel and its colors both vary and say "
      f"different things; {_REMEDY}."
    )
  return painted


def _of_colors(
  colors: Shaped[np.ndarray, "h w c"], lossy: bool, where: str
) -> Reading:
  gray = colors[..., 0]
  if all((gray == colors[..., i]).all() for i in range(1, colors.shape[-1])):
    return _of_gray(gray, lossy, where)
  if lossy:
    raise DataError(
      f"{where}: the mask is a colored image of a format that changes colors "
      f"(JPEG or the like), perhaps a photo; {_REMEDY}."
    )
  found = _different_colors(colors)
  if len(found) > _MAX_PARTS + 1:
    raise DataError(
      f"{where}: the mask contains {len(found)} or more colors; it is a photo, "
      f"a label map or has soft edges in color; {_REMEDY}."
    )
  named = ", ".join(_named(color) for color in found)
  parts = [color for color in found if any(color)]
  if len(parts) == len(found):
    raise DataError(
      f"{where}: the mask contains the colors {named} and no black background; "
      f"{_REMEDY}."
    )
  odd = (
    any(len(set(part)) == 1 for part in parts)  # White says something else.
    or _VOID in parts
    or (len(parts) > 1 and any(max(part) < _IDS_BELOW for part in parts))
  )
  if odd:
    raise DataError(
      f"{where}: the mask contains the colors {named}, of which some may be "
      f'classes, instances or "ignore"; {_REMEDY}.'
    )
  return Reading((colors != 0).any(-1), "colored", named)


def _different_colors(colors: Shaped[np.ndarray, "h w c"]) -> list[tuple]:
  """The colors that occur, as tuples; at most a few more than are read."""
  left, found = colors.reshape(-1, colors.shape[-1]), []
  while len(left) and len(found) <= 4 * _MAX_PARTS:
    found.append(tuple(left[0].tolist()))
    left = left[(left != left[0]).any(-1)]
  return sorted(found)


def _named(color: Sequence[float]) -> str:
  if not any(color):
    return "black"
  return f"({', '.join(map(_number, color))})"


def _number(value: float) -> str:
  return f"{value:.6g}"


def _of_gray(
  values: Shaped[np.ndarray, "h w"], lossy: bool, where: str
) -> Reading:
  levels = _different(values)
  low, high = levels[0], levels[-1]
  listed = ", ".join(map(_number, levels[:_LISTED].tolist()))
  if len(levels) > _LISTED:
    listed += f", ... {_number(high.item())} ({len(levels)} in all)"
  if low < 0:
    raise DataError(
      f"{where}: the mask contains values below 0: {listed}; {_REMEDY}."
    )
  if lossy or len(levels) > 2:
    return _of_soft(
      values, levels, lossy, f"{where}: the mask contains {listed}"
    )
  if len(levels) == 1:
    top = np.iinfo(values.dtype).max if values.dtype.kind in "ui" else 1
    if high not in (0, 1, 255, top):
      raise DataError(
        f"{where}: the mask contains nothing but the value {listed}, which may "
        f"mean the object or the background; {_REMEDY}."
      )
    return Reading(values > 0, "one value", listed)
  if high == 255 and 0 < low < _IDS_BELOW:
    raise DataError(
      f"{where}: the mask contains {listed}; {_number(low.item())} may be a "
      f'class and 255 "ignore"; {_REMEDY}.'
    )
  return Reading(values > low, "two values", listed)


def _different(values: Shaped[np.ndarray, "h w"]) -> Shaped[np.ndarray, "n"]:
  if values.dtype == np.bool_:
    values = values.view(np.uint8)
  if values.dtype == np.uint8:  # Ten times as quick as sorting.
    counts = cv2.calcHist(
      [np.ascontiguousarray(values)], [0], None, [256], (0, 256)
    )
    return np.flatnonzero(counts)
  return np.unique(values)


def _of_soft(
  values: Shaped[np.ndarray, "h w"],
  levels: Shaped[np.ndarray, "n"],
  lossy: bool,
  said: str,
) -> Reading:
  """Gray levels between background and object, at the edges only."""
  high = levels[-1]
  # A mask of 0 and 1 does not survive a lossy format.
  scales = _SCALES[1:] if lossy else _SCALES
  scale = next((s for s in scales if high <= s), None)
  if (
    scale is None
    or high < (1 - _NEAR_END) * scale
    or levels[0] > _NEAR_END * scale
  ):
    raise DataError(
      f"{said}, which may be classes, instances or something else; {_REMEDY}."
    )
  share = values.astype(np.float32) / np.float32(scale)
  middle = ((share > _MIDDLE) & (share < 1 - _MIDDLE)).astype(np.uint8)
  width = max(7, min(values.shape) // 50)
  area = np.ones((width, width), np.uint8)
  low_near = cv2.erode(share, area) <= _MIDDLE
  high_near = cv2.dilate(share, area) >= 1 - _MIDDLE
  stray = np.count_nonzero((middle > 0) & ~(low_near & high_near))
  some = 4 + _STRAY * np.count_nonzero(share > MASK_THRESHOLD)
  wide = cv2.erode(middle, area, borderType=cv2.BORDER_REPLICATE).any()
  if wide or stray > some:
    raise DataError(
      f"{said} with areas that are neither black nor white, as in a photo or a "
      f"map of classes; {_REMEDY}."
    )
  if not lossy:
    _require_smooth(share, len(levels), said)
  kind = "soft" if len(levels) > 2 else "two values"
  return Reading(share > MASK_THRESHOLD, kind, f"0 to {scale}")


def _spread(share: Shaped[np.ndarray, "h w"], count: int) -> bool:
  """Whether the levels between both ends are those of edges, not the numbers
  of classes beside a 255 that means "ignore"."""
  inner = np.unique(share[(share > share.min()) & (share < share.max())])
  if count <= 2 * _FEW:
    return bool(inner.min() >= 2 * _SLACK)
  middle = (inner > _NEAR_END) & (inner < 1 - _NEAR_END)
  return bool(3 * np.count_nonzero(middle) >= len(inner))


def _require_smooth(
  share: Shaped[np.ndarray, "h w"], count: int, said: str
) -> None:
  """Refuses a few steps, or areas of one level between the ends: there a level
  stands for something."""
  square = np.ones((3, 3), np.uint8)
  flat = cv2.erode(share, square) == cv2.dilate(share, square)
  slack = _SLACK if count >= _MANY else 0
  flat &= (share > share.min() + slack) & (share < share.max() - slack)
  if count <= _FEW or flat.any() or not _spread(share, count):
    raise DataError(
      f'{said}, of which some may be classes, instances or "ignore"; {_REMEDY}.'
    )
