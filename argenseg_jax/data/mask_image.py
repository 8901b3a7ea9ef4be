"""From an encoded mask, an image or an array of numpy, to its two values."""

import dataclasses
import io
import zipfile

import cv2
import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image, ImageFile

from argenseg_jax.data import image_codec, mask_values, safe_npz
from argenseg_jax.data.errors import DataError

_ARRAY = b"\x93NUMPY"
_ARCHIVE = b"PK\x03\x04"
# Of 8 bits in Pillow, whatever the file holds.
_MODES = ("1", "L", "LA", "RGB", "RGBA")


def read(
  stored: image_codec.Encoded, *, where: str = ""
) -> mask_values.Reading:
  """Which pixels of an encoded mask are the object, see `mask_values.read`.

  Palettes are read by their colors, and the file's own EXIF orientation is
  followed. Arrays are `.npy`, or `.npz` with one array.

  Raises:
    DataError: missing, truncated, several frames, not a mask.
  """
  data, name = image_codec.read_encoded(stored, where)
  if data.startswith((_ARRAY, _ARCHIVE)):
    return mask_values.read(_array(data, name), where=name)
  with image_codec.opened(data, "mask", name) as image:
    _require_one_frame(image)
    orientation, left = image_codec.own_orientation(image)
    lossy = _is_lossy(image, data)
    indexed = image.mode in ("P", "PA")
    values = _channels(image, data)
  reading = mask_values.read(values, lossy=lossy, where=name)
  kind = f"indexed, {reading.kind}" if indexed else reading.kind
  seg_mask = image_codec.turn(reading.seg_mask, left)
  return dataclasses.replace(
    reading, seg_mask=seg_mask, kind=kind, orientation=orientation
  )


def read_ids(
  stored: image_codec.Encoded, *, color: bool, where: str = ""
) -> Int[np.ndarray, "h w"]:
  """The numbers of a map of classes or segments.

  Args:
    stored: an encoded image: gray or indexed (the index counts), or in color.
    color: whether a pixel means R + 256 G + 65536 B.
    where: the record, for messages.

  Raises:
    DataError: it cannot be decoded, or numbers are not what it holds.
  """
  data, name = image_codec.read_encoded(stored, where)
  with image_codec.opened(data, "map", name) as image:
    _require_one_frame(image)
    orientation, _ = image_codec.own_orientation(image)
    if orientation != 1:
      raise DataError("it has an EXIF orientation; store it upright")
    if _is_lossy(image, data):
      raise DataError("JPEG and the like change its numbers; use PNG")
    if color:
      if image.mode not in ("RGB", "RGBA") or _is_deep(image):
        raise DataError(f"its mode is {image.mode}; use RGB of 8 bits")
      rgb = np.array(image)[..., :3].astype(np.int64)
      return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    if image.mode not in ("1", "L", "P", "I") and image.mode[:4] != "I;16":
      raise DataError(f"its mode is {image.mode}; use gray levels or a palette")
    if image.mode != "P" and len(image.getbands()) == 1 and _is_narrow(image):
      raise DataError("it has 2 or 4 bits a pixel; use 8")
    return np.array(image).astype(np.int64)


def _require_one_frame(image: Image.Image) -> None:
  frames = getattr(image, "n_frames", 1)
  if frames != 1:
    raise DataError(f"it holds {frames} frames; store the one that counts")


def _channels(image: Image.Image, data: bytes) -> Shaped[np.ndarray, "h w ..."]:
  """All that an image holds, in the numbers that it holds."""
  if image.mode in ("P", "PA"):
    return _palette_colors(image)
  if image.mode[:1] in ("I", "F"):
    if "transparency" in image.info:
      raise DataError("it has more than 8 bits and a transparent value")
    values = np.asarray(image)
    return values.astype(values.dtype.newbyteorder("="))
  if _is_deep(image):
    return _deep(data)
  if "transparency" in image.info:
    return np.array(image.convert("RGBA"))
  if image.mode not in _MODES:
    image = image.convert("RGBA" if image.mode in ("La", "RGBa") else "RGB")
  return np.array(image)


def _palette_colors(image: Image.Image) -> Shaped[np.ndarray, "h w 4"]:
  indices = np.array(image.getchannel(0) if image.mode == "PA" else image)
  colors = np.array(image.convert("RGBA"))
  if (indices != indices[0, 0]).any() and (colors == colors[0, 0]).all():
    raise DataError("its palette gives all indices the same color")
  return colors


def _raw_mode(image: Image.Image) -> str:
  """How a file holds pixels, as Pillow's decoders name it."""
  tiles = image.tile if isinstance(image, ImageFile.ImageFile) else ()
  return str(tiles[0].args) if tiles else ""


def _is_deep(image: Image.Image) -> bool:
  """Whether Pillow would keep but 8 of the 16 bits of a file."""
  return image.mode in _MODES and ";16" in _raw_mode(image)


def _is_narrow(image: Image.Image) -> bool:
  """Whether Pillow stretches 2 or 4 bits to 8."""
  raw = _raw_mode(image)
  return image.mode == "L" and (";2" in raw or ";4" in raw)


def _deep(data: bytes) -> Shaped[np.ndarray, "h w c"]:
  encoded = np.frombuffer(data, np.uint8)
  values = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
  if values is None or values.dtype != np.uint16:
    raise DataError("it has 16 bits a channel; use 8")
  if values.ndim == 2:
    return values
  return values[..., [2, 1, 0, 3][: values.shape[-1]]]


def _is_lossy(image: Image.Image, data: bytes) -> bool:
  """Whether the format changes values a little."""
  if image.format == "WEBP":
    return b"VP8L" not in data[:64]
  if image.format == "TIFF":
    return "jpeg" in str(image.info.get("compression", ""))
  return image.format in ("JPEG", "MPO", "JPEG2000")


def _array(data: bytes, name: str) -> Shaped[np.ndarray, "..."]:
  """The only array of a `.npy` or `.npz`, which must fit its bytes."""
  most = 8 * image_codec.MAX_PIXELS
  try:
    if data.startswith(_ARCHIVE):
      arrays = safe_npz.read_from(io.BytesIO(data), most)
    else:
      arrays = {"": safe_npz.read_array(data)}
  except (*safe_npz.ERRORS, zipfile.LargeZipFile) as error:
    raise DataError(f"cannot decode mask {name}: {error}.") from error
  if len(arrays) != 1:
    raise DataError(
      f"{name} holds the arrays {', '.join(arrays) or 'none'}; a mask is one."
    )
  (array,) = arrays.values()
  return array
