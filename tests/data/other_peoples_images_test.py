"""Masks and images that people really have: what is read, what is refused."""

import io
import os

import numpy as np
import pytest
from data import layouts
from PIL import Image, ImageFilter

from argenseg_jax.config import DataConfig
from argenseg_jax.data import image_codec, masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.registry import open_source

SIZE = (48, 64)
OBJECT = np.zeros(SIZE, bool)
OBJECT[8:30, 10:40] = True
STRIP = np.zeros(SIZE, bool)
STRIP[:, 50:] = True
LEFT, RIGHT = layouts.LEFT, layouts.RIGHT


def _saved(image, kind="PNG", **options):
  data = io.BytesIO()
  image.save(data, kind, **options)
  return data.getvalue()


def _gray(levels, dtype=np.uint8):
  return Image.fromarray(np.asarray(levels, dtype))


def _painted(*pairs, mode="RGB"):
  image = np.zeros((*SIZE, len(mode)), np.uint8)
  for where, color in pairs:
    image[where] = color
  return Image.fromarray(image)


def _photo(seed=0):
  rough = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
  return Image.fromarray(rough).resize(SIZE[::-1], Image.BICUBIC)


def _indexed(levels, colors):
  image = Image.new("P", SIZE[::-1])
  image.putdata(np.asarray(levels).ravel().tolist())
  image.putpalette([value for color in colors for value in color])
  return image


def _frames():
  frames = [_gray(OBJECT * 255), _gray(~OBJECT * 255)]
  return _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _npy(array):
  data = io.BytesIO()
  np.save(data, array)
  return data.getvalue()


def _npz(**arrays):
  data = io.BytesIO()
  np.savez(data, **arrays)
  return data.getvalue()


BLACK, WHITE, RED, GREEN = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0)
TOP = np.arange(SIZE[0])[:, None] < 20
SEVERAL = OBJECT * 1 + STRIP * 2
MASKS_READ = {
  "0 and 255": _saved(_gray(OBJECT * 255)),
  "16 bits": _saved(_gray(OBJECT * 65535, np.uint16)),
  "white first": _saved(_gray(OBJECT * 255).quantize(2)),
  "black first": _saved(_indexed(OBJECT * 1, (BLACK, WHITE))),
  "indexed GIF": _saved(_indexed(~OBJECT * 1, (WHITE, BLACK)), "GIF"),
  "JPEG": _saved(_gray(OBJECT * 255), "JPEG", quality=75),
  "cut-out": _saved(
    _painted((..., (*WHITE, 0)), (OBJECT, (*WHITE, 255)), mode="RGBA")
  ),
  "black cut-out": _saved(_painted((OBJECT, (*BLACK, 255)), mode="RGBA")),
  "both agree": _saved(_painted((OBJECT, (*WHITE, 255)), mode="RGBA")),
  "two colors": _saved(_painted((OBJECT & TOP, RED), (OBJECT & ~TOP, GREEN))),
  "gray 127": _saved(_gray(OBJECT * 127)),
  "float 0.5": _saved(_gray(OBJECT * 0.5, np.float32), "TIFF"),
  "16 bits RGB": masks.mask_image.cv2.imencode(
    ".png", np.repeat((OBJECT * 1).astype(np.uint16)[..., None], 3, 2)
  )[1].tobytes(),
  "bool npy": _npy(OBJECT),
  "npz": _npz(mask=OBJECT[..., None] * np.uint8(1)),
}
MASKS_REFUSED = {
  "1 and 255-ignore": (
    _saved(_gray(OBJECT * 1 + STRIP * 255)),
    "contains 0, 1, 255, .*ignore",
  ),
  "only 1 and 255": (
    _saved(_gray(~STRIP * 1 + STRIP * 255)),
    "contains 1, 255",
  ),
  "two instances": (_saved(_gray(SEVERAL)), "contains 0, 1, 2"),
  "twenty classes": (
    _saved(_gray(np.where(STRIP, 255, np.arange(64) % 21))),
    "contains 0, 1, 2",
  ),
  "thin classes": (
    _saved(_gray(np.where(np.arange(48)[:, None] % 3, 0, SEVERAL * 40))),
    "contains 0, 40, 80",
  ),
  "three grays": (_saved(_gray(SEVERAL * 127)), "contains 0, 127, 254"),
  "classes in 16 bits": (
    _saved(_gray(SEVERAL * 1000, np.uint16)),
    "contains 0, 1000, 2000",
  ),
  "Pascal VOC": (
    _saved(_painted((OBJECT, (128, 0, 0)), (STRIP, (224, 224, 192)))),
    r"black, \(128, 0, 0\), \(224, 224, 192\).*ignore",
  ),
  "Pascal VOC, indexed": (
    _saved(_indexed(SEVERAL, (BLACK, (128, 0, 0), (224, 224, 192)))),
    "classes, instances",
  ),
  "white and red": (
    _saved(_painted((OBJECT, WHITE), (STRIP, RED))),
    "some may",
  ),
  "no black": (_saved(_painted((..., RED), (OBJECT, GREEN))), "no black"),
  "alpha and colors": (
    _saved(_painted((OBJECT, (*RED, 255)), (STRIP, (*GREEN, 0)), mode="RGBA")),
    "both vary",
  ),
  "a photo": (_saved(_photo(), "JPEG"), "perhaps a photo"),
  "a photo in PNG": (_saved(_photo()), "it is a photo"),
  "a gray photo": (
    _saved(_photo().convert("L").point(lambda level: max(level * 2 - 150, 0))),
    "neither black nor white",
  ),
  "a gray JPEG photo": (
    _saved(_photo().convert("L"), "JPEG"),
    "classes|neither black nor white",
  ),
  "0 and 1 in JPEG": (_saved(_gray(OBJECT * 1), "JPEG"), "contains 0"),
  "all transparent": (_saved(_painted(mode="RGBA")), "is transparent"),
  "one gray": (_saved(_gray(np.full(SIZE, 7))), "nothing but the value 7"),
  "frames": (_frames(), "holds 2 frames"),
  "one color for all": (
    _saved(_indexed(OBJECT * 1, (RED, RED))),
    "all indices the same color",
  ),
  "NaN": (_npy(np.where(OBJECT, np.nan, 0)), "NaN"),
  "logits": (_npy(np.where(OBJECT, 3.0, -2.0)), "below 0"),
  "two arrays": (_npz(a=OBJECT, b=OBJECT), "arrays a, b; a mask is one"),
  "text": (_npy(np.full(SIZE, "a")), "not numbers"),
  "objects": (_npy(np.full(SIZE, "a", object)), "cannot decode mask"),
}


@pytest.mark.parametrize("what", MASKS_READ)
def test_masks_that_are_read(what):
  got = masks.load_seg_mask(MASKS_READ[what], size=SIZE)
  np.testing.assert_array_equal(got, OBJECT)


@pytest.mark.parametrize("what", MASKS_REFUSED)
def test_masks_that_are_refused(what):
  stored, said = MASKS_REFUSED[what]
  with pytest.raises(DataError, match=said):
    masks.load_seg_mask(stored, size=SIZE, where="here")


@pytest.mark.parametrize("radius", [0.5, 0.7, 1, 1.5, 2])
@pytest.mark.parametrize("size", [2, 3, 4, 6, 12, 30])
def test_soft_masks_have_one_threshold(radius, size):
  shape = np.zeros(SIZE, bool)
  shape[8 : 8 + size, 10 : 10 + size] = True
  soft = _gray(shape * 255).filter(ImageFilter.GaussianBlur(radius))
  if np.array(soft).max() < 230:  # Too faint to be sure.
    with pytest.raises(DataError, match="may be classes"):
      masks.read(_saved(soft))
    return
  reading = masks.read(_saved(soft))
  assert reading.kind == "soft"
  np.testing.assert_array_equal(reading.seg_mask, np.array(soft) > 127)
  stretched = _npy(np.array(soft, np.float32) / 255)
  np.testing.assert_array_equal(
    masks.load_seg_mask(stretched), reading.seg_mask
  )


# ---- images ----------------------------------------------------------------


def test_images_of_more_bits_are_neither_black_nor_white(tmp_path):
  gray = np.array(_photo().convert("L"))
  as_8_bits = image_codec.decode_image(_saved(_gray(gray)))
  for image in (
    _gray(gray / np.float32(255), np.float32),
    _gray(gray, np.float32),
    _gray(gray, np.int32),
    _gray(gray * np.int32(257), np.int32),
    _gray(gray * np.uint16(257), np.uint16),
  ):
    got = image_codec.decode_image(_saved(image, "TIFF"))
    np.testing.assert_array_equal(got, as_8_bits)
    for given in (image, np.asarray(image)):
      np.testing.assert_array_equal(image_codec.image_pixels(given), as_8_bits)
  for bad in (np.full(SIZE, np.nan), np.full(SIZE, -1.0), np.ones((3, 3, 2))):
    with pytest.raises(DataError, match="an image"):
      image_codec.image_pixels(bad)


def test_only_regular_files_are_read(tmp_path):
  pipe = tmp_path / "pipe.jpg"
  os.mkfifo(pipe)
  for path in (pipe, "/dev/zero", tmp_path):
    for read in (image_codec.decode_image, masks.load_seg_mask):
      with pytest.raises(DataError, match=r"cannot read .* (regular|folder)"):
        read(path)
  for source in ("jsonl", "refer", "meta", "coco_panoptic"):
    with pytest.raises(DataError, match="not a regular file"):
      open_source(DataConfig(str(pipe), source=source))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_turn_as_exif_says(orientation, kind):
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"WEBP": {"lossless": True}}.get(kind, {"quality": 98})
  data = _saved(_photo(), kind, exif=exif, **options)
  upright = image_codec.turn(np.array(_photo()), orientation)
  got = image_codec.decode_image(data).astype(int)
  assert got.shape == upright.shape
  assert np.abs(got - upright).mean() < 4
  frame = image_codec.image_frame(data)
  assert frame == (SIZE, orientation)
  assert frame.upright_size == upright.shape[:2]


# ---- records ---------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_never_lies_beside_its_object(orientation, tmp_path):
  """Masks of images as stored, and of images as shown."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  (tmp_path / "a.jpg").write_bytes(_saved(_photo(), "JPEG", exif=exif))
  shown = image_codec.turn(OBJECT, orientation)
  for mask, is_turned in ((OBJECT, False), (shown, True)):
    polygon = [[float(n) for n in layouts.box(mask)]]
    Image.fromarray(mask).save(tmp_path / "m.png")
    for stored in ("m.png", masks.run_lengths(mask), polygon):
      record = {"image": "a.jpg", "mask": stored}
      record["conversations"] = layouts.chat("<image>\na", "<mask>")
      path = layouts.write_lines(tmp_path / "a.jsonl", [record])
      sample = open_source(DataConfig(str(path), source="jsonl"))[0]
      size = sample.load_image().shape[:2]
      try:
        got = sample.sized(size).load_seg_mask()
      except DataError as error:
        refused = str(error)
      else:
        refused = ""
      if refused:
        assert orientation > 1, is_turned
        assert f"EXIF orientation {orientation}" in refused
        continue
      assert orientation in (1, 5, 6, 7, 8)
      assert not isinstance(stored, list) or orientation == 1
      np.testing.assert_array_equal(got, shown)
