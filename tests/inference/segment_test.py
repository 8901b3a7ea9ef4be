"""Mask images on their way out: truncated, as the authors' are."""

import jax
import numpy as np

from argenseg_jax.data import transforms
from argenseg_jax.inference.segment import to_uint8


def test_images_leave_by_truncation_not_by_rounding():
  """Rounding moves every second pixel of a soft edge up by one, and a gray of
  127.5 over the threshold of a mask."""
  values = np.arange(255, dtype=np.float32)
  for part in (0.25, 0.5, 0.75, 0.96):
    images = (values + np.float32(part)) / np.float32(255) * 2 - 1
    found = np.asarray(jax.jit(to_uint8)(images))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, values)
  ends = np.array([-1.0, 1.0], np.float32)
  np.testing.assert_array_equal(to_uint8(ends), [0, 255])
  half = np.array([0.0039], np.float32)  # 127.997 of 255.
  assert not transforms.binary_mask(np.asarray(to_uint8(half))).any()
