"""Images at the sizes that models take, and the way back from masks.

Pillow's fixed-point resize is the definition; OpenCV's is a faster switch that
comes close. Functions are pure and take their sizes as arguments. The pipeline
keeps uint8; the device normalizes it (`models.argenseg`).
"""

from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from argenseg_jax.types import IMAGENET_MEAN, MASK_THRESHOLD

Backend = Literal["pillow", "opencv"]

_PILLOW = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
}
_OPENCV = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR}


def resize(
  pixels: UInt8[np.ndarray, "..."],
  size: tuple[int, int],
  *,
  filter: Literal["bicubic", "bilinear"] = "bicubic",
  backend: Backend = "pillow",
) -> UInt8[np.ndarray, "..."]:
  """Resizes [h w] or [h w 3] to `size` (height, width), without keeping the
  aspect. What has the size already is given back itself."""
  height, width = size
  if pixels.shape[:2] == size:
    return pixels
  if backend == "opencv":
    shrinks = height < pixels.shape[0] and width < pixels.shape[1]
    # OpenCV's own filters do not widen when they shrink; area averaging does.
    method = cv2.INTER_AREA if shrinks else _OPENCV[filter]
    return cv2.resize(pixels, (width, height), interpolation=method)
  image = Image.fromarray(pixels)
  return np.asarray(image.resize((width, height), _PILLOW[filter]))


def resize_image(
  pixels: UInt8[np.ndarray, "h w 3"],
  side: int,
  *,
  backend: Backend = "pillow",
  pad_square: bool = False,
) -> UInt8[np.ndarray, "side side 3"]:
  """An image as the vision tower takes it.

  Args:
    pad_square: center the image on a square of ImageNet's mean color first,
      instead of distorting it.
  """
  height, width = pixels.shape[:2]
  if pad_square and height != width:
    longer = max(height, width)
    square = np.empty((longer, longer, 3), np.uint8)
    square[:] = [int(m * 255) for m in IMAGENET_MEAN]
    top, left = (longer - height) // 2, (longer - width) // 2
    square[top : top + height, left : left + width] = pixels
    pixels = square
  return resize(pixels, (side, side), backend=backend)


def image_tiles(
  pixels: UInt8[np.ndarray, "h w 3"], side: int, *, max_tiles: int
) -> UInt8[np.ndarray, "tiles side side 3"]:
  """Cuts an image into the grid of squares nearest to its aspect.

  More than one tile is followed by a thumbnail of the whole.
  """
  height, width = pixels.shape[:2]
  grids = sorted(
    (
      (columns, rows)
      for columns in range(1, max_tiles + 1)
      for rows in range(1, max_tiles + 1)
      if columns * rows <= max_tiles
    ),
    key=lambda grid: grid[0] * grid[1],
  )
  best, best_distance = (1, 1), float("inf")
  for columns, rows in grids:
    distance = abs(width / height - columns / rows)
    # Of equally good grids the larger one, if the image can fill it.
    fills = width * height > 0.5 * side * side * columns * rows
    if distance < best_distance or (distance == best_distance and fills):
      best, best_distance = (columns, rows), distance
  columns, rows = best
  whole = resize(pixels, (side * rows, side * columns))
  tiles = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
  tiles = tiles.reshape(rows * columns, side, side, 3)
  if len(tiles) > 1:
    tiles = np.concatenate((tiles, resize(pixels, (side, side))[None]))
  return tiles


def fit_inside(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
  """Where an image of `size` (height, width) lies in a padded square.

  Returns:
    top, left, height, width.
  """
  aspect = size[1] / size[0]
  height = int(side / aspect) if aspect > 1 else side
  width = side if aspect > 1 else int(side * aspect)
  height, width = max(height, 1), max(width, 1)
  return (side - height) // 2, (side - width) // 2, height, width


def mask_target(
  seg_mask: Bool[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
  side: int,
  *,
  intermediate_side: int | None = 512,
  backend: Backend = "pillow",
  pad_square: bool = False,
) -> UInt8[np.ndarray, "side side"]:
  """A mask as the image tokenizer takes it: 0..255, white object on black.

  Args:
    seg_mask: two-valued; or levels in 0..255, taken as they are.
    intermediate_side: resized to this square on the way, as the authors do;
      None goes straight.
    pad_square: keep the aspect, with black around, and no intermediate size.
  """
  if seg_mask.dtype == np.bool_:
    seg_mask = seg_mask.astype(np.uint8) * np.uint8(255)
  if pad_square:
    top, left, height, width = fit_inside(seg_mask.shape, side)
    square = np.zeros((side, side), np.uint8)
    square[top : top + height, left : left + width] = resize(
      seg_mask, (height, width), backend=backend
    )
    return square
  if intermediate_side is not None:
    middle = (intermediate_side, intermediate_side)
    seg_mask = resize(seg_mask, middle, backend=backend)
  return resize(seg_mask, (side, side), backend=backend)


def gray_at_size(
  generated: UInt8[np.ndarray, "side side 3"],
  size: tuple[int, int],
  *,
  pad_square: bool = False,
) -> UInt8[np.ndarray, "h w"]:
  """A generated mask image, resized to an image's `size`, then gray."""
  if generated.ndim == 3 and generated.shape[-1] == 1:
    generated = generated[..., 0]
  if pad_square:
    top, left, height, width = fit_inside(size, generated.shape[0])
    generated = generated[top : top + height, left : left + width]
  resized = resize(np.ascontiguousarray(generated), size, filter="bilinear")
  return np.asarray(Image.fromarray(resized).convert("L"))


def binary_mask(gray: UInt8[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
  """Which pixels of a generated mask are the object."""
  return gray > MASK_THRESHOLD * 255
