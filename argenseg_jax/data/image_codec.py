"""Encoded images to pixels and back: headers, EXIF orientation, limits."""

import contextlib
import io
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from argenseg_jax.data import input_files
from argenseg_jax.data.errors import DataError
from argenseg_jax.runtime import paths

# What OpenCV refuses is reported by `DataError`, not on the terminal.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

Encoded = bytes | str | paths.Path
# A larger image is refused before it is decoded; Pillow's own limit.
MAX_PIXELS = 89_478_485
# Of an encoded image; a larger one is refused before it is read.
MAX_FILE_BYTES = 1 << 30
# What Pillow is allowed to open. Some of its other formats run programs.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright.
_PPM = re.compile(rb"P6\n([1-9]\d{0,5}) ([1-9]\d{0,5})\n255\n")


class Frame(NamedTuple):
  """How an image is stored, before its EXIF orientation turns it.

  Attributes:
    size: height and width as stored.
    orientation: EXIF's, 1 to 8; 1 leaves the image as it is.
  """

  size: tuple[int, int]
  orientation: int

  @property
  def upright_size(self) -> tuple[int, int]:
    """Height and width as shown."""
    height, width = self.size
    return (width, height) if self.orientation >= 5 else (height, width)


def decode_image(
  stored: Encoded, *, where: str = ""
) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes an image to RGB, turned as its EXIF orientation says.

  Gray, CMYK and palette images are converted; alpha is dropped. Numbers of
  more than 8 bits: see `image_pixels`.

  Raises:
    DataError: missing, truncated, not an image, or of more than MAX_PIXELS.
  """
  data, name = read_encoded(stored, where)
  pixels = _pixels(data)
  if pixels is not None:
    return pixels
  with opened(data, "image", name) as image:
    orientation = _orientation(image)
    wide = image.mode[:1] in ("I", "F")
    if _is_whole(data) and not wide and image.format not in ("TIFF", "GIF"):
      with contextlib.suppress(cv2.error):
        encoded = np.frombuffer(data, np.uint8)
        pixels = cv2.imdecode(
          encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
        if pixels is not None:
          return turn(pixels, orientation)
    # A second opinion on what OpenCV refuses.
    image.load()
    return turn(image_pixels(image), _left_to_turn(image, orientation))


def image_pixels(
  image: Image.Image | Shaped[np.ndarray, "..."],
) -> UInt8[np.ndarray, "h w 3"]:
  """RGB of an image that is decoded already, as its file would give it.

  Of 16 bits the upper 8 are kept. Floats from 0 to 1 are multiplied by 255,
  other ones and integers of 32 bits must lie in 0..255 (or 0..65535, then
  of the upper 8 bits).

  Args:
    image: of Pillow, any mode; or an array [h w], [h w 1], [h w 3] or [h w 4].

  Raises:
    DataError: numbers out of these ranges, or another shape.
  """
  if isinstance(image, Image.Image):
    if image.mode[:1] not in ("I", "F"):
      return np.array(image.convert("RGB"))
    image = np.asarray(image)
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
    raise DataError(
      f"an image has the shape {list(image.shape)}; use [height, width] with "
      "1, 3 or 4 channels."
    )
  pixels = _eight_bits(image[..., :3])
  return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _eight_bits(
  values: Shaped[np.ndarray, "h w c"],
) -> UInt8[np.ndarray, "h w c"]:
  if values.dtype == np.uint8:
    return values
  if values.dtype == np.bool_:
    return values.astype(np.uint8) * np.uint8(255)
  if values.dtype.kind not in "uif":
    raise DataError(f"an image holds {values.dtype}, not numbers.")
  if not values.size:
    return values.astype(np.uint8)
  low, high = values.min(), values.max()
  if not (low >= 0 and high <= 65535):  # False for NaN, too.
    raise DataError(
      f"an image holds numbers from {low} to {high}; use 0..255, 0..65535, or "
      "floats in 0..1."
    )
  if values.dtype.kind == "f":
    if high <= 1:
      return np.rint(values * 255).astype(np.uint8)
    if high <= 255:
      return np.rint(values).astype(np.uint8)
    return (values.astype(np.int64) >> 8).astype(np.uint8)
  if values.dtype.itemsize > 2 and high <= 255:
    return values.astype(np.uint8)
  return (values.astype(np.int64) >> 8).astype(np.uint8)


def image_frame(stored: Encoded, *, where: str = "") -> Frame:
  """Size and orientation from an image's header.

  Raises:
    DataError: see `decode_image`; later parts of the file are left unread.
  """
  if isinstance(stored, bytes) or not paths.is_local(_as_path(stored)):
    data, name = read_encoded(stored, where)
    with opened(data, "image", name) as image:
      return _frame(image)
  descriptor = input_files.open_regular(_as_path(stored))
  with (
    open(descriptor, "rb") as file,
    _opened_file(file, "image", str(stored)) as image,
  ):
    return _frame(image)


def _frame(image: Image.Image) -> Frame:
  frame = Frame((image.height, image.width), _orientation(image))
  if image.format == "TIFF":  # Whose size Pillow gives as shown.
    return frame._replace(size=frame.upright_size)
  return frame


def turn(
  pixels: Shaped[np.ndarray, "h w ..."], orientation: int
) -> Shaped[np.ndarray, "h2 w2 ..."]:
  """Stored pixels as EXIF's orientation (1 to 8) shows them."""
  if orientation >= 5:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(pixels)


def _orientation(image: Image.Image) -> int:
  """EXIF's, from the header; 1 where there is none that is known."""
  try:
    if image.format == "TIFF":
      found = image.tag_v2.get(_ORIENTATION, 1)  # pyright: ignore
    else:
      exif = Image.Exif()
      exif.load(image.info.get("exif", b""))
      found = exif.get(_ORIENTATION, 1)
  except Exception:  # Broken EXIF is no reason to refuse an image.
    return 1
  return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _left_to_turn(image: Image.Image, orientation: int) -> int:
  """What is still to be done to an image that Pillow has loaded: it turns TIFF
  itself."""
  return 1 if image.format == "TIFF" else orientation


def own_orientation(image: Image.Image) -> tuple[int, int]:
  """EXIF's orientation of an open image, and what is left to turn of it once
  its pixels are loaded."""
  orientation = _orientation(image)
  return orientation, _left_to_turn(image, orientation)


@contextlib.contextmanager
def opened(data: bytes, what: str, name: str) -> Iterator[Image.Image]:
  """An image whose header is read and whose pixels are not yet; anything that
  goes wrong within becomes a DataError."""
  with _opened_file(io.BytesIO(data), what, name) as image:
    yield image


@contextlib.contextmanager
def _opened_file(file, what: str, name: str) -> Iterator[Image.Image]:
  try:
    with Image.open(file, formats=_FORMATS) as image:
      width, height = image.size
      if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are too many")
      yield image
  except DataError as error:
    reason = str(error).rstrip(".")
    raise DataError(f"cannot decode {what} {name}: {reason}.") from error
  except Exception as error:  # Pillow raises all kinds on broken files.
    raise _undecodable(what, name, error) from error


def degrade(
  pixels: UInt8[np.ndarray, "h w 3"], quality: int
) -> UInt8[np.ndarray, "h w 3"]:
  """An image after JPEG of some quality (0..100), as training may see it."""
  bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
  _, jpeg = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, quality))
  degraded = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)
  assert degraded is not None  # It was just encoded.
  return degraded


def encode_pixels(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
  """An image as PPM: `decode_image` copies nothing and computes nothing."""
  height, width = pixels.shape[:2]
  return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def _pixels(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
  """What `encode_pixels` was given; None for any other image."""
  header = _PPM.match(data)
  if header is None:
    return None
  width, height = map(int, header.groups())
  if len(data) != header.end() + 3 * width * height:
    return None
  flat = np.frombuffer(data, np.uint8, offset=header.end())
  return flat.reshape(height, width, 3)


def _as_path(stored: str | paths.Path) -> paths.Path:
  return pathlib.Path(stored) if isinstance(stored, str) else stored


def read_encoded(stored: Encoded, where: str) -> tuple[bytes, str]:
  """The bytes of an encoded image, and its name for messages."""
  if isinstance(stored, bytes):
    return stored, where or "(bytes)"
  path = _as_path(stored)
  return input_files.read_bytes(path, most=MAX_FILE_BYTES), str(stored)


def _undecodable(what: str, name: str, error: Exception) -> DataError:
  reason = str(error).rstrip(".")
  if isinstance(error, UnidentifiedImageError):
    reason = "not a known image format"
  return DataError(f"cannot decode {what} {name}: {reason}.")


def _is_whole(data: bytes) -> bool:
  """Whether JPEG and PNG data has its end; OpenCV fills in what is missing."""
  if data.startswith(b"\xff\xd8"):
    return b"\xff\xd9" in data[-64:]
  return not data.startswith(b"\x89PNG") or b"IEND" in data[-64:]
