"""Encoded images: decoding and encoding."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import image_codec
from argenseg_jax.data.errors import DataError

_ROUGH = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
PICTURE = cv2.resize(_ROUGH, (80, 60), interpolation=cv2.INTER_LINEAR)


def _encode(picture, kind, **options):
  data = io.BytesIO()
  picture.save(data, kind, **options)
  return data.getvalue()


def _variants():
  picture = Image.fromarray(PICTURE)
  alpha = picture.copy()
  alpha.putalpha(128)
  deep = cv2.imencode(".png", PICTURE[..., ::-1].astype(np.uint16) * 257)[1]
  return {
    "jpeg": _encode(picture, "JPEG", quality=97, subsampling=0),
    "cmyk": _encode(picture.convert("CMYK"), "JPEG", quality=97),
    "png": _encode(picture, "PNG"),
    "alpha": _encode(alpha, "PNG"),
    "webp": _encode(picture, "WEBP", lossless=True),
    "deep": deep.tobytes(),
  }


@pytest.mark.parametrize("kind", list(_variants()))
def test_decoding_gives_rgb(kind):
  got = image_codec.decode_image(_variants()[kind])
  assert got.dtype == np.uint8
  exact = kind in ("png", "alpha", "webp", "deep")
  off = np.abs(got.astype(np.int32) - PICTURE)
  assert off.max() <= (0 if exact else 24)
  assert off.mean() <= (0 if exact else 2)


def test_gray_pictures_get_three_equal_channels():
  gray = Image.fromarray(PICTURE).convert("L")
  for kind in ("PNG", "GIF"):
    got = image_codec.decode_image(_encode(gray, kind))
    np.testing.assert_array_equal(
      got, np.repeat(np.array(gray)[..., None], 3, 2)
    )
  deep = cv2.imencode(".png", np.array(gray, np.uint16) * 257)[1].tobytes()
  np.testing.assert_array_equal(
    image_codec.decode_image(deep)[..., 0], np.array(gray)
  )


def test_exif_orientation_is_followed():
  exif = Image.Exif()
  exif[0x0112] = 6  # To be shown turned clockwise.
  data = _encode(Image.fromarray(PICTURE), "JPEG", quality=97, exif=exif)
  got = image_codec.decode_image(data)
  assert got.shape == (80, 60, 3)
  off = np.abs(got.astype(np.int32) - np.rot90(PICTURE, -1))
  assert off.mean() < 3


@pytest.mark.parametrize("kind", ["jpeg", "cmyk", "png", "webp", "deep"])
def test_truncated_pictures_are_named(tmp_path, kind):
  data = _variants()[kind]
  path = tmp_path / "broken.img"
  for length in (0, 40, len(data) // 2, len(data) * 9 // 10):
    path.write_bytes(data[:length])
    with pytest.raises(DataError, match=r"cannot decode image .*broken\.img"):
      image_codec.decode_image(path)


def test_missing_pictures_are_named(tmp_path):
  with pytest.raises(DataError, match=r"cannot read .*no\.jpg: No such file"):
    image_codec.decode_image(tmp_path / "no.jpg")


def test_pixels_are_kept_as_they_are():
  encoded = image_codec.encode_pixels(PICTURE)
  np.testing.assert_array_equal(image_codec.decode_image(encoded), PICTURE)
  other_readers = np.array(Image.open(io.BytesIO(encoded)))
  np.testing.assert_array_equal(other_readers, PICTURE)
  for broken in (encoded[:-1], encoded[:9]):
    with pytest.raises(DataError, match="cannot decode image"):
      image_codec.decode_image(broken)


def test_degraded_pictures_are_jpegs_of_them():
  fine = image_codec.degrade(PICTURE, 100).astype(np.int32)
  rough = image_codec.degrade(PICTURE, 10).astype(np.int32)
  assert np.abs(fine - PICTURE).mean() < 2
  assert np.abs(rough - PICTURE).mean() > 2 * np.abs(fine - PICTURE).mean()
