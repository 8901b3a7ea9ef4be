import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.data import transforms
from argenseg_jax.inference.segment import seg_mask_at_size, to_uint8
from argenseg_jax.models.argenseg import normalize_seg_masks


def _smooth(height, width):
  rng = np.random.default_rng(0)
  rough = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
  return cv2.resize(rough, (width, height), interpolation=cv2.INTER_LINEAR)


PICTURE = _smooth(60, 80)


def test_an_image_of_the_size_is_given_back_itself():
  assert transforms.resize(PICTURE, (60, 80)) is PICTURE


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
  gray = _smooth(32, 32)[..., :1]
  np.testing.assert_array_equal(
    transforms.gray_at_size(gray, (50, 30)),
    transforms.gray_at_size(gray.repeat(3, -1), (50, 30)),
  )
