"""Images as files, PIL objects and arrays: the same pixels whatever the way."""

import os

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data.errors import DataError
from argenseg_jax.inference import predictor

_RAMP = np.linspace(0, 1, 35).reshape(5, 7)
_COLORS = np.stack((_RAMP, _RAMP[::-1], _RAMP[:, ::-1]), -1)


def _saved(pixels, path, **options):
  if not isinstance(pixels, Image.Image):
    pixels = Image.fromarray(pixels)
  pixels.save(path, **options)
  return path


@pytest.mark.parametrize(
  ("pixels", "name"),
  [
    ((_RAMP * 255).astype(np.uint8), "gray.png"),
    ((_COLORS * 255).astype(np.uint8), "rgb.png"),
    ((_COLORS * 255).astype(np.uint8), "rgb.tif"),
    ((_RAMP * 65535).astype(np.uint16), "16.png"),
    ((_RAMP * 65535).astype(np.uint16), "16.tif"),
    (_RAMP.astype(np.float32), "float.tif"),
    ((_RAMP * 255).astype(np.float32), "float_255.tif"),
    ((_RAMP * 65535).astype(np.int32), "32.tif"),
    (_RAMP > 0.5, "bits.png"),
  ],
)
def test_arrays_and_objects_equal_their_file(pixels, name, tmp_path):
  path = _saved(pixels, tmp_path / name)
  from_file = predictor._pixels(str(path))
  assert from_file.dtype == np.uint8
  assert from_file.shape == (5, 7, 3)
  assert np.ptp(from_file) > 200  # Neither black nor white.
  with Image.open(path) as opened:
    np.testing.assert_array_equal(predictor._pixels(opened), from_file)
  np.testing.assert_array_equal(predictor._pixels(pixels), from_file)
  np.testing.assert_array_equal(predictor._pixels(path), from_file)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_every_mode_of_pillow_equals_its_file(mode, tmp_path):
  image = Image.fromarray((_COLORS * 255).astype(np.uint8)).convert(mode)
  path = _saved(
    image, tmp_path / ("x.png" if mode[:2] not in ("CM", "YC") else "x.tif")
  )
  with Image.open(path) as opened:
    np.testing.assert_array_equal(
      predictor._pixels(opened), predictor._pixels(path)
    )


def test_an_image_is_turned_as_its_file_says(tmp_path):
  image = Image.fromarray((_COLORS * 255).astype(np.uint8))
  exif = Image.Exif()
  exif[0x0112] = 6
  path = _saved(image, tmp_path / "x.png", exif=exif)
  from_file = predictor._pixels(path)
  assert from_file.shape == (7, 5, 3)
  with Image.open(path) as opened:
    np.testing.assert_array_equal(predictor._pixels(opened), from_file)


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((5, 7, 2), np.uint8),
    np.zeros(5, np.uint8),
    np.full((5, 7), np.nan, np.float32),
    np.full((5, 7), 1e9),
    np.full((5, 7), -1),
    np.zeros((5, 7), object),
  ],
)
def test_what_is_no_image_is_refused(image):
  with pytest.raises(DataError, match="an image"):
    predictor._pixels(image)


def test_a_pipe_or_a_device_is_no_image(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
    with pytest.raises(DataError, match="cannot read"):
      predictor._pixels(path)
