import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError

SQUARE = np.zeros((7, 9), np.uint8)
SQUARE[2:5, 3:8] = 1


def _png(pixels, mode=None):
  picture = Image.fromarray(pixels)
  data = io.BytesIO()
  (picture.convert(mode) if mode else picture).save(data, "PNG")
  return data.getvalue()


def _counts(pixels):
  flat = pixels.T.reshape(-1)
  edges = np.flatnonzero(np.diff(flat)) + 1
  bounds = np.concatenate(([0], edges, [len(flat)]))
  runs = np.diff(bounds).tolist()
  return runs if flat[0] == 0 else [0, *runs]


def test_every_way_to_store_a_mask_gives_the_same_pixels(tmp_path):
  compressed = coco.encode(np.asfortranarray(SQUARE))
  text = {"size": [7, 9], "counts": compressed["counts"].decode()}
  path = tmp_path / "m.png"
  path.write_bytes(_png(SQUARE * 255))
  for stored in (
    compressed,
    text,
    {"size": [7, 9], "counts": _counts(SQUARE)},
    [[3, 2, 8, 2, 8, 5, 3, 5]],
    [3, 2, 8, 2, 8, 5, 3, 5],
    _png(SQUARE),
    _png(SQUARE * 255),
    _png(SQUARE * 255, "RGB"),
    _png(SQUARE * 255, "1"),
    path,
    str(path),
  ):
    got = masks.load_seg_mask(stored, size=(7, 9))
    np.testing.assert_array_equal(got, SQUARE > 0)
    assert got.dtype == np.bool_


def test_random_masks_survive_run_lengths():
  rng = np.random.default_rng(0)
  for _ in range(50):
    pixels = (rng.random(rng.integers(1, 40, 2)) > 0.6).astype(np.uint8)
    stored = coco.encode(np.asfortranarray(pixels))
    np.testing.assert_array_equal(masks.load_seg_mask(stored), pixels)
    stored = {"size": list(pixels.shape), "counts": _counts(pixels)}
    np.testing.assert_array_equal(masks.load_seg_mask(stored), pixels)


def test_palettes_are_read_by_colors_and_label_maps_by_index():
  picture = Image.fromarray(SQUARE).convert("P")
  picture.putpalette([255, 255, 255, 0, 0, 0])
  data = io.BytesIO()
  picture.save(data, "PNG")
  got = masks.load_seg_mask(data.getvalue())
  np.testing.assert_array_equal(got, SQUARE == 0)
  got = masks.load_seg_mask(masks.Segment(data.getvalue(), (1,)))
  np.testing.assert_array_equal(got, SQUARE == 1)


@pytest.mark.parametrize(
  ("stored", "message"),
  [
    ({"size": [7, 9], "counts": [3, 5]}, "do not add up to 7x9"),
    ({"size": [7, 9], "counts": [3, -5, 65]}, "do not add up to 7x9"),
    ({"size": [7, 9], "counts": "PPYo0PP"}, "broken|do not add up"),
    ({"size": [7, 9], "counts": "\x01\x02"}, "is broken"),
    ({"counts": [63]}, 'needs "size"'),
    ([[1, 2, 3]], "at least three"),
    ([[1, 2, "a", 4, 5, 6]], "at least three"),
    (17, "cannot be a int"),
    (b"not a png", "cannot decode mask here: not a known image format"),
    (_png(np.zeros((3, 3), np.uint8)), "3x3 pixels but the image 9x7"),
  ],
)
def test_bad_masks_are_named(stored, message):
  with pytest.raises(DataError, match=message):
    masks.load_seg_mask(stored, size=(7, 9), where="here")


def test_polygons_need_a_size():
  with pytest.raises(DataError, match="needs the size"):
    masks.load_seg_mask([[1, 2, 3, 4, 5, 6]])
