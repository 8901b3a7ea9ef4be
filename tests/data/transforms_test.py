import io

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import transforms
from argenseg_jax.data.errors import DataError
from argenseg_jax.inference.segment import seg_mask_at_size, to_uint8
from argenseg_jax.models.argenseg import normalize_seg_masks


def _smooth(height, width):
  rng = np.random.default_rng(0)
  rough = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
  return cv2.resize(rough, (width, height), interpolation=cv2.INTER_LINEAR)


PICTURE = _smooth(60, 80)


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
  got = transforms.decode_image(_variants()[kind])
  assert got.dtype == np.uint8
  exact = kind in ("png", "alpha", "webp", "deep")
  off = np.abs(got.astype(np.int32) - PICTURE)
  assert off.max() <= (0 if exact else 24)
  assert off.mean() <= (0 if exact else 2)


def test_grey_pictures_get_three_equal_channels():
  grey = Image.fromarray(PICTURE).convert("L")
  for kind in ("PNG", "GIF"):
    got = transforms.decode_image(_encode(grey, kind))
    np.testing.assert_array_equal(
      got, np.repeat(np.array(grey)[..., None], 3, 2)
    )
  deep = cv2.imencode(".png", np.array(grey, np.uint16) * 257)[1].tobytes()
  np.testing.assert_array_equal(
    transforms.decode_image(deep)[..., 0], np.array(grey)
  )


def test_exif_orientation_is_followed():
  exif = Image.Exif()
  exif[0x0112] = 6  # To be shown turned clockwise.
  data = _encode(Image.fromarray(PICTURE), "JPEG", quality=97, exif=exif)
  got = transforms.decode_image(data)
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
      transforms.decode_image(path)


def test_missing_pictures_are_named(tmp_path):
  with pytest.raises(DataError, match=r"cannot read .*no\.jpg: No such file"):
    transforms.decode_image(tmp_path / "no.jpg")


def test_pixels_are_kept_as_they_are():
  encoded = transforms.encode_pixels(PICTURE)
  np.testing.assert_array_equal(transforms.decode_image(encoded), PICTURE)
  other_readers = np.array(Image.open(io.BytesIO(encoded)))
  np.testing.assert_array_equal(other_readers, PICTURE)
  assert transforms.resize(PICTURE, (60, 80)) is PICTURE
  for broken in (encoded[:-1], encoded[:9]):
    with pytest.raises(DataError, match="cannot decode image"):
      transforms.decode_image(broken)


def test_degraded_pictures_are_jpegs_of_them():
  fine = transforms.degrade(PICTURE, 100).astype(np.int32)
  rough = transforms.degrade(PICTURE, 10).astype(np.int32)
  assert np.abs(fine - PICTURE).mean() < 2
  assert np.abs(rough - PICTURE).mean() > 2 * np.abs(fine - PICTURE).mean()


@pytest.mark.parametrize("size", [(40, 40), (33, 100), (100, 120)])
def test_opencv_comes_close_to_pillow(size):
  exact = transforms.resize(PICTURE, size)
  quick = transforms.resize(PICTURE, size, backend="opencv")
  off = np.abs(exact.astype(np.int32) - quick)
  assert exact.shape == quick.shape == (*size, 3)
  assert off.mean() < 1.5


def test_mask_target_levels():
  seg_mask = np.zeros((50, 40), bool)
  seg_mask[10:30, 5:20] = True
  for backend in ("pillow", "opencv"):
    small = transforms.mask_target(
      seg_mask, 16, intermediate_side=None, backend=backend
    )
    assert small.shape == (16, 16)
    assert (small.min(), small.max()) == (0, 255)
    levels = seg_mask.astype(np.uint8) * np.uint8(255)
    same = transforms.mask_target(
      levels, 16, intermediate_side=None, backend=backend
    )
    np.testing.assert_array_equal(small, same)
  assert not transforms.mask_target(np.zeros((5, 5), np.uint8), 8).any()


@pytest.mark.parametrize("size", [(40, 100), (100, 40), (64, 64), (37, 151)])
@pytest.mark.parametrize("pad_square", [False, True])
def test_a_mask_comes_back_at_the_pictures_size(size, pad_square):
  seg_mask = np.zeros(size, bool)
  seg_mask[size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = True
  target = transforms.mask_target(seg_mask, 128, pad_square=pad_square)
  generated = np.asarray(
    to_uint8(normalize_seg_masks(jnp.asarray(target)[..., None]))
  )
  back = seg_mask_at_size(generated, size, pad_square=pad_square)
  assert (back & seg_mask).sum() / (back | seg_mask).sum() > 0.88


def test_images_leave_by_truncation():
  x = np.array([-1.0, -0.001, 0.0, 0.5, 0.999, 1.0], np.float32)
  for convert in (to_uint8, jax.jit(to_uint8)):
    np.testing.assert_array_equal(convert(x), [0, 127, 127, 191, 254, 255])


def test_one_channel_is_enough_for_a_generated_mask():
  grey = _smooth(32, 32)[..., :1]
  np.testing.assert_array_equal(
    transforms.grey_at_size(grey, (50, 30)),
    transforms.grey_at_size(grey.repeat(3, -1), (50, 30)),
  )
