"""Images and masks: decoding, resizing, and the way back.

Pillow's fixed-point resize is the definition; OpenCV's is a faster switch that
comes close. Functions are pure and take their sizes as arguments. The pipeline
keeps uint8: `models.argenseg` normalizes it on the device.
"""

import contextlib
import io
import pathlib
import re
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from argenseg_jax.data.errors import DataError
from argenseg_jax.runtime import paths
from argenseg_jax.types import IMAGENET_MEAN

# What OpenCV refuses is reported by `DataError`, not on the terminal.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

Backend = Literal["pillow", "opencv"]
Encoded = bytes | str | paths.Path

# A larger picture is refused before it is decoded; Pillow's own limit.
MAX_PIXELS = 89_478_485
# What Pillow is allowed to open. Some of its other formats run programs.
_FORMATS = (
  "BMP",
  "GIF",
  "JPEG",
  "JPEG2000",
  "PNG",
  "PPM",
  "TIFF",
  "WEBP",
)

_PILLOW = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
}
_PPM = re.compile(rb"P6\n([1-9]\d{0,5}) ([1-9]\d{0,5})\n255\n")
_OPENCV = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR}


def decode_image(
  stored: Encoded, *, where: str = ""
) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes a picture to RGB, turned as its EXIF orientation says.

  Grey, CMYK, palette and 16-bit pictures are converted; alpha is dropped.

  Raises:
    DataError: missing, truncated, not a picture, or of more than MAX_PIXELS.
  """
  data, name = read_encoded(stored, where)
  pixels = _pixels(data)
  if pixels is not None:
    return pixels
  with _opened(data, "picture", name) as picture:
    if _is_whole(data):
      with contextlib.suppress(cv2.error):
        encoded = np.frombuffer(data, np.uint8)
        pixels = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
          return pixels
    # A second opinion on what OpenCV refuses.
    return np.array(ImageOps.exif_transpose(picture).convert("RGB"))


def decode_seg_mask(
  stored: Encoded, *, where: str = ""
) -> UInt8[np.ndarray, "h w"]:
  """Decodes a picture of a mask; palette indices are kept as they are."""
  data, name = read_encoded(stored, where)
  with _opened(data, "mask", name) as picture:
    if picture.mode not in ("L", "P", "1"):
      picture = picture.convert("L")
    return np.array(picture, dtype=np.uint8)


@contextlib.contextmanager
def _opened(data: bytes, what: str, name: str) -> Iterator[Image.Image]:
  """A picture whose header is read and whose pixels are not yet; anything that
  goes wrong within becomes a DataError."""
  try:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
      width, height = picture.size
      if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are too many")
      yield picture
  except Exception as error:  # Pillow raises all kinds on broken files.
    raise _undecodable(what, name, error) from error


def degrade(
  pixels: UInt8[np.ndarray, "h w 3"], quality: int
) -> UInt8[np.ndarray, "h w 3"]:
  """A picture after JPEG of some quality (0..100), as training may see it."""
  bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
  _, jpeg = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, quality))
  return cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)


def encode_pixels(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
  """A picture as PPM: `decode_image` copies nothing and computes nothing."""
  height, width = pixels.shape[:2]
  return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def _pixels(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
  """What `encode_pixels` was given; None for any other picture."""
  header = _PPM.match(data)
  if header is None:
    return None
  width, height = map(int, header.groups())
  if len(data) != header.end() + 3 * width * height:
    return None
  flat = np.frombuffer(data, np.uint8, offset=header.end())
  return flat.reshape(height, width, 3)


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
  picture = Image.fromarray(pixels)
  return np.asarray(picture.resize((width, height), _PILLOW[filter]))


def resize_image(
  pixels: UInt8[np.ndarray, "h w 3"],
  side: int,
  *,
  backend: Backend = "pillow",
  pad_square: bool = False,
) -> UInt8[np.ndarray, "side side 3"]:
  """A picture as the vision tower takes it.

  Args:
    pad_square: centre the picture on a square of ImageNet's mean colour first,
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
  """Cuts a picture into the grid of squares nearest to its aspect.

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
    # Of equally good grids the larger one, if the picture can fill it.
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
  """Where a picture of `size` (height, width) lies in a padded square.

  Returns:
    top, left, height, width.
  """
  aspect = size[1] / size[0]
  height = int(side / aspect) if aspect > 1 else side
  width = side if aspect > 1 else int(side * aspect)
  height, width = max(height, 1), max(width, 1)
  return (side - height) // 2, (side - width) // 2, height, width


def mask_target(
  seg_mask: UInt8[np.ndarray, "h w"],
  side: int,
  *,
  intermediate_side: int | None = 512,
  backend: Backend = "pillow",
  pad_square: bool = False,
) -> UInt8[np.ndarray, "side side"]:
  """A mask as the image tokenizer takes it: 0..255, white object on black.

  Args:
    seg_mask: 0/1 or 0/255; below 127 the values are multiplied by 255 (in
      uint8, as the authors do).
    intermediate_side: resized to this square on the way, as the authors do;
      None goes straight.
    pad_square: keep the aspect, with black around, and no intermediate size.
  """
  if seg_mask.size and seg_mask.max() < 127:
    seg_mask = seg_mask * np.uint8(255)
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


def grey_at_size(
  generated: UInt8[np.ndarray, "side side 3"],
  size: tuple[int, int],
  *,
  pad_square: bool = False,
) -> UInt8[np.ndarray, "h w"]:
  """A generated mask image, resized to a picture's `size`, then grey."""
  if generated.ndim == 3 and generated.shape[-1] == 1:
    generated = generated[..., 0]
  if pad_square:
    top, left, height, width = fit_inside(size, generated.shape[0])
    generated = generated[top : top + height, left : left + width]
  resized = resize(np.ascontiguousarray(generated), size, filter="bilinear")
  return np.asarray(Image.fromarray(resized).convert("L"))


def binary_mask(grey: UInt8[np.ndarray, "h w"]) -> np.ndarray:
  """Bool [h w]: grey / 255 > 0.5."""
  return grey > 127


def read_encoded(stored: Encoded, where: str) -> tuple[bytes, str]:
  if isinstance(stored, bytes):
    return stored, where or "(bytes)"
  try:
    path = pathlib.Path(stored) if isinstance(stored, str) else stored
    return path.read_bytes(), str(stored)
  except OSError as error:
    raise DataError(
      f"cannot read {stored}: {error.strerror or error}."
    ) from error
  except ValueError as error:  # A name that no file can have.
    raise DataError(f"cannot read {str(stored)!r}: {error}.") from error


def _undecodable(what: str, name: str, error: Exception) -> DataError:
  reason = str(error).rstrip(".")
  if isinstance(error, UnidentifiedImageError):
    reason = "not a known picture format"
  return DataError(f"cannot decode {what} {name}: {reason}.")


def _is_whole(data: bytes) -> bool:
  """Whether JPEG and PNG data has its end; OpenCV fills in what is missing."""
  if data.startswith(b"\xff\xd8"):
    return b"\xff\xd9" in data[-64:]
  return not data.startswith(b"\x89PNG") or b"IEND" in data[-64:]
