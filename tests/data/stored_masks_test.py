"""One mask stored in hundreds of ways: read as that mask, or refused."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError

MASK = np.zeros((24, 32), bool)
MASK[5:16, 8:20] = True
MASK[16:20, 8:12] = True
PAIRS = (
  *((0, 1), (0, 255), (255, 0), (1, 0), (0, 127), (0, 128), (1, 2), (2, 1)),
  *((100, 200), (254, 255), (1, 255), (0, 2), (0, 17), (255, 254), (10, 240)),
)
WIDE = (*PAIRS, (0, 256), (0, 65535), (65535, 0), (255, 256), (1000, 60000))
TWO_VALUES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32")
TWO_VALUES += ("int64", "uint64", "float16", "float32", "float64")


def _saved(image, kind, **options):
  data = io.BytesIO()
  image.save(data, kind, **options)
  return data.getvalue()


def _levels(pair, dtype=np.uint8):
  """The mask in two levels: background, then object."""
  return np.where(MASK, pair[1], pair[0]).astype(dtype)


def _images():
  """(what it is, encoded bytes, whether the higher level is the object)."""
  lossless = ("PNG", "TIFF", "GIF", "BMP", "PPM")
  for pair, kind in itertools.product(PAIRS, (*lossless, "JPEG")):
    right = pair[1] > pair[0]
    gray = Image.fromarray(_levels(pair))
    yield f"L {kind} {pair}", _saved(gray, kind), right
    if kind != "GIF":
      data = _saved(gray.convert("RGB"), kind)
      yield f"RGB {kind} {pair}", data, right
  for pair in PAIRS:
    right = pair[1] > pair[0]
    gray = Image.fromarray(_levels(pair))
    for lossless in (False, True):
      data = _saved(gray.convert("RGB"), "WEBP", lossless=lossless)
      yield f"WEBP {lossless} {pair}", data, right
    for kind in ("TIFF", "JPEG"):
      data = _saved(gray.convert("CMYK"), kind)
      yield f"CMYK {kind} {pair}", data, right
    for mode in ("LA", "RGBA"):
      data = _saved(gray.convert(mode), "PNG")
      yield f"opaque {mode} {pair}", data, right
    for color in ((255, 255, 255), (0, 0, 0), (9, 99, 199)):
      cut = Image.new("RGB", gray.size, color)
      cut.putalpha(gray)
      yield f"alpha {pair} {color}", _saved(cut, "PNG"), right
    for quality in (30, 75, 95):
      data = _saved(gray, "JPEG", quality=quality)
      yield f"JPEG {quality} {pair}", data, right
  for pair in WIDE:
    right = pair[1] > pair[0]
    deep = Image.fromarray(_levels(pair, np.uint16))
    for kind in ("PNG", "TIFF"):
      yield f"I;16 {kind} {pair}", _saved(deep, kind), right
    for dtype in (np.int32, np.float32):
      image = Image.fromarray(_levels(pair, dtype))
      yield f"{dtype.__name__} TIFF {pair}", _saved(image, "TIFF"), right
  for low, high in ((0.0, 1.0), (0.0, 0.5), (0.25, 0.5), (1.0, 0.0)):
    image = Image.fromarray(_levels((low, high), np.float32))
    yield f"float {low} {high}", _saved(image, "TIFF"), high > low
  yield from _palettes()
  yield from _one_bit()


def _palettes():
  grays = ((0, 0, 0), (255, 255, 255), (100, 100, 100), (254, 254, 254))
  colors = ((128, 0, 0), (255, 0, 0), (3, 0, 0), (68, 1, 84), (224, 224, 192))
  for (a, b), (i, j), kind in itertools.product(
    itertools.permutations(grays + colors, 2),
    ((0, 1), (1, 0), (0, 255), (5, 3)),
    ("PNG", "TIFF"),
  ):
    image = Image.fromarray(_levels((i, j))).convert("P")
    image.putdata(_levels((i, j)).ravel())
    palette = np.full((256, 3), 77, np.uint8)
    palette[i], palette[j] = a, b
    image.putpalette(palette.ravel().tolist())
    what = f"P {kind} {a} {b} at {i} {j}"
    if a in grays and b in grays:
      yield what, _saved(image, kind), b > a
    else:  # On black, what is colored; else nobody knows.
      yield what, _saved(image, kind), a == (0, 0, 0)


def _one_bit():
  for mask, kind in itertools.product((MASK, ~MASK), ("PNG", "TIFF", "PPM")):
    image = Image.fromarray(mask)
    yield f"1 {kind} {mask[0, 0]}", _saved(image, kind), mask is MASK
  for pair, bits in itertools.product(((0, 1), (1, 0)), (1, 2, 4)):
    image = Image.fromarray(_levels(pair)).convert("P")
    image.putdata(_levels(pair).ravel())
    image.putpalette([0, 0, 0, 255, 255, 255])
    data = _saved(image, "PNG", bits=bits)
    yield f"P of {bits} bits {pair}", data, pair[1] > pair[0]


def _arrays():
  for pair, dtype in itertools.product(WIDE[:8] + WIDE[-4:], TWO_VALUES):
    if dtype == "float16" and max(pair) > 60000:
      continue  # Infinite in it.
    levels = _levels(pair, np.int64).astype(dtype)
    low, high = levels[0, 0], levels[6, 9]
    if low == high:
      continue  # The type cannot hold them.
    for shape in (MASK.shape, (*MASK.shape, 1)):
      data = io.BytesIO()
      np.save(data, levels.reshape(shape))
      yield f"npy {dtype} {pair}", data.getvalue(), bool(high > low)
    data = io.BytesIO()
    np.savez_compressed(data, mask=levels)
    yield f"npz {dtype} {pair}", data.getvalue(), bool(high > low)


WAYS = [*_images(), *_arrays()]


def test_no_way_to_store_a_mask_gives_another_one():
  """The object, where the higher value marks it; else its background, which
  is what two such values mean; or a refusal. Never anything else."""
  read, other = 0, []
  for what, data, object_is_higher in WAYS:
    try:
      got = masks.load_seg_mask(data, where=what)
    except DataError:
      continue
    read += 1
    wanted = MASK if object_is_higher else ~MASK
    # A lossy format may move the edge where it is coarse.
    if not np.array_equal(got, wanted):
      other.append(what)
  assert not other
  assert len(WAYS) > 800
  assert read > 450


@pytest.mark.parametrize(
  "what",
  [
    *("L PNG (0, 255)", "L PNG (0, 1)", "RGB BMP (0, 1)", "L GIF (0, 127)"),
    *("JPEG 75 (0, 255)", "I;16 PNG (0, 65535)", "I;16 TIFF (0, 256)"),
    *("int32 TIFF (0, 65535)", "float32 TIFF (0, 1)", "float 0.0 0.5"),
    *("alpha (0, 255) (255, 255, 255)", "opaque LA (0, 1)", "1 PPM False"),
    *("CMYK TIFF (0, 255)", "WEBP True (0, 1)", "WEBP False (0, 255)"),
    *("P PNG (0, 0, 0) (128, 0, 0) at 0 255", "npy bool (0, 1)"),
    *("P PNG (0, 0, 0) (255, 255, 255) at 5 3", "npz float16 (0, 1)"),
    *("P of 1 bits (0, 1)", "P of 4 bits (0, 1)", "npz uint64 (0, 65535)"),
  ],
)
def test_the_usual_ways_are_read(what):
  data = next(data for name, data, _ in WAYS if name == what)
  np.testing.assert_array_equal(masks.load_seg_mask(data), MASK)
