"""Files that people really have: what is read, and what is refused and why.

A table of situations that users of other projects reported, in inputs of our
own. Whatever is read must be what was meant; the rest is named.
"""

import io
import json
import os
import pickle
import re

import numpy as np
import pytest
from data import layouts
from PIL import Image, ImageFilter

from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data import image_codec, masks, text
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.sources import registry
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.evaluation import records

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


def _rows(**keys):
  config = DataConfig(
    sequence_length=400,
    image_side=16,
    mask_side=16,
    mask_channels=1,
    max_masks=2,
    **keys,
  )
  return RowMaker(
    open_source(config),
    config,
    tokenizer=text.TextTokenizer(),
    image_tokens=4,
    num_codes=5,
  )


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


def _line(**changes):
  """A record of jsonl beside a.jpg and left.png."""
  chat = layouts.chat("<image>\nthe box", "<mask>")
  record = {"image": "a.jpg", "mask": "left.png", "conversations": chat}
  record |= changes
  return {k: v for k, v in record.items() if v is not ...}


def _ask(**changes):
  return _line(mask=..., conversations=...) | changes


LINES_REFUSED = [
  (_line(image=...), "1 <image> in its requests but 0"),
  (_line(image=..., images=["a.jpg"]), "unknown key 'images'.*'image'"),
  (_line(image=..., img="a.jpg"), "'img'.*'image'"),
  (_line(image=..., image_path="a.jpg"), "'image_path'.*'image'"),
  (_line(image=..., imagePath="a.jpg"), "'imagePath'.*'image'"),
  (_line(image=..., file_name="a.jpg"), "'file_name'.*'image'"),
  (_line(mask=..., masks=["left.png"]), "'masks'.*'mask'"),
  (_line(mask=..., segmentation=[[1, 2]]), "'segmentation'.*'mask'"),
  (_line(conversations=..., conversation=[]), "'conversations'"),
  (_line(image=["a.jpg", None]), "names a file by None"),
  (_line(image=" "), "names a file by ' '"),
  (_line(mask="a.jpg"), "a.jpg as image and as mask"),
  (_line(kind=""), "empty kind"),
  (_line(mask=[[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]), "not in shares of the image"),
  (
    _line(mask=[[1, 1, 9, 1, 9, 9]], width=60, height=40),
    "has 30x20 pixels, the annotations say 60x40",
  ),
  (_line(width=60, height=40), "the annotations say 60x40"),
  (_line(width=30, height="tall"), '"width" or "height" that is none'),
  (_line(widht=30), "'widht'.*'width'"),
  (_line(void="left.png"), "'void'.*'ignore'"),
  (_line(ignore=["left.png", "left.png"]), '2 "ignore" but 1 masks'),
  (_ask(question="Which?", options=["a", "b"], answer="A"), "'choices'"),
  (_ask(text="Is it?", label=1), "label 1, which could be a number or mean"),
  (_line(dataset=["a"]), "no text"),
  (_line(conversations=layouts.chat("<image>\na", " ")), "turn 2 is empty"),
  (
    _line(conversations=layouts.chat("<image>\na", "<mask>")[:1]),
    "end with an ans",
  ),
  (
    _line(conversations=[{"from": "user", "value": "a"}]),
    "turn 1 is from 'user'",
  ),
  (_line(kind="absent"), 'kind "absent", but its mask has an object'),
  (_ask(question="Which?"), 'without "answer"'),
  (_ask(question=7, answer="a"), "question 7, which is no text"),
  (_ask(question="Which?", anwser="a"), "'anwser'.*'answer'"),
  (_ask(question="Is it?", answer=True), "answer True, which is no text"),
  (_ask(question="Is it?", answer="maybe", kind="yes_no"), 'not "yes" or'),
  (_ask(question="Which?", answers=["a", None]), "answer None"),
  (_ask(question="Which?", answer="a", image=""), "names a file by ''"),
  (_ask(question="Which?", choices=["a", "b"], answer=2), "index of none"),
  (_ask(question="Which?", choices=["a", "b"], answer="c"), "is none of"),
  (_ask(question="Which?", choices=["B", "A"], answer="A"), "could be several"),
  (_ask(question="Which?", choices=["a", "a"], answer=0), "'a' twice"),
  (_ask(question="Which?", choices=["a"], answer=0), "1 choices; use 2 to"),
  ('{"image": "a.jpg", "image": "b.jpg"}', "the key 'image' twice"),
  ('{"image": "a.jpg", "x": NaN}', "it contains NaN"),
  (json.dumps(_line()).encode("utf-16"), "is UTF-16, not UTF-8"),
  ('{"text": "\N{LATIN SMALL LETTER E WITH ACUTE}"}'.encode("latin1"), "UTF-8"),
]


@pytest.fixture
def images(tmp_path):
  layouts.picture(tmp_path / "a.jpg", 0)
  layouts.mask(tmp_path / "left.png", LEFT)
  return tmp_path


def _written(path, records, bom=b""):
  lines = [
    r if isinstance(r, bytes) else r.encode()
    for r in (
      r if isinstance(r, (str, bytes)) else json.dumps(r) for r in records
    )
  ]
  path.write_bytes(bom + b"\n".join(lines))
  return {"path": str(path), "source": "jsonl"}


def _fault(source_keys, index=0):
  """What is wrong with a record, at opening, reading or making its row."""
  try:
    rows = _rows(**source_keys)
  except DataError as error:
    return str(error)
  return rows(index).error


def test_lines_that_are_refused(images):
  for record, said in LINES_REFUSED:
    keys = _written(images / "x.jsonl", [record])
    assert re.search(said, _fault(keys)), said


def test_null_is_absent_and_answers_are_read(images):
  nothing = {"kind": None, "answers": None, "choices": None, "mask": None}
  cases = [
    (_ask(text="Dog?", label="Yes.", **nothing), "yes_no", ("yes",), "Yes."),
    (_ask(text="Dog?", label="no ", **nothing), "yes_no", ("no",), "no"),
    (_ask(question="How many?", answer=5), "text", (), "5"),
    (_ask(question="Q", choices=["cat", "dog"], answer=1), "choice", (), "B"),
    (_ask(question="Q", choices=["cat", "dog"], answer="A"), "choice", (), "A"),
    (
      _ask(question="Q", choices=["cat", "dog"], answer="Dog"),
      "choice",
      (),
      "B",
    ),
    (
      _ask(question="Q", answers=[{"answer": "a"}, {"answer": "b"}]),
      *("vqa", ("a", "b"), "a"),
    ),
    (_line(img_width=64, category="cup", id=None), "referring", (), "<mask>"),
    (_line(width=30, height=20, weight=3), "referring", (), "<mask>"),
    (_line(ignore="left.png"), "referring", (), "<mask>"),
    (_ask(question="How many?", answer=1), "text", (), "1"),
  ]
  keys = _written(
    images / "x.jsonl", [record for record, *_ in cases], b"\xef\xbb\xbf"
  )
  rows = _rows(**keys)
  for index, (_, kind, answers, answer) in enumerate(cases):
    assert not rows(index).error
    sample = rows.source[index]
    assert (sample.kind, sample.answers) == (kind, answers)
    assert sample.conversation[-1]["value"] == answer
  regions = [sample.load_ignore(0) for sample in rows.source if sample.ignores]
  np.testing.assert_array_equal(regions, [LEFT])


def test_marks_and_separators_are_no_part_of_texts(images):
  (images / "a.png").write_bytes((images / "left.png").read_bytes())
  (images / "left.png").unlink()
  said = "the red\N{LINE SEPARATOR}cup"
  (images / "a.txt").write_bytes(
    b"\xef\xbb\xbf" + f"{said}\r\n\r\n the mug \n".encode()
  )
  sample = open_source(DataConfig(str(images), source="folder"))[0]
  assert sample.expressions == (said, "the mug")
  (images / "a.txt").write_bytes("the mug".encode("utf-16"))
  with pytest.raises(DataError, match=r"a\.txt is UTF-16"):
    open_source(DataConfig(str(images), source="folder"))[0]


def test_a_folder_where_names_are_doubtful(images):
  for name in ("a.png", "b.png", "._a.jpg", "a.jpeg"):
    (images / name).write_bytes(b"x")
  source = open_source(DataConfig(str(images), source="folder"))
  assert len(source) == 2
  assert "2 files without an image" in source.notes[0]
  with pytest.raises(DataError, match="several images named 'a'"):
    source[0]


def _coco(folder, change, layout="refer", **keys):
  """A layout with COCO's annotations after a change."""
  given = layouts.write(layout, folder) | keys
  file = folder / "instances.json"
  content = json.loads(file.read_text())
  refs = folder / "refs(unc).p"
  if layout == "refer":
    content["refs"] = pickle.loads(refs.read_bytes())
  change(content)
  if layout == "refer":
    refs.write_bytes(pickle.dumps(content.pop("refs"), 2))
  file.write_text(json.dumps(content))
  return given


def _annotation(content, number=0):
  return next(a for a in content["annotations"] if a["id"] == number)


def _set(**changes):
  return lambda content: _annotation(content).update(changes)


def _twice(key, **changes):
  def change(content):
    content[key].append(content[key][0] | changes)

  return change


def _drop(key):
  return lambda content: _annotation(content).pop(key)


def _ref(**changes):
  return lambda content: content["refs"][0].update(changes)


BOX = layouts.box(LEFT)
RUNS = masks.run_lengths(LEFT)
FLAT = LEFT.T.ravel()
COUNTS = np.diff(
  [0, *(np.flatnonzero(np.diff(FLAT.astype(int))) + 1), FLAT.size]
).tolist()
COCO_REFUSED = [
  (_twice("annotations", segmentation=[layouts.box(RIGHT)]), "annotation 0, w"),
  (_twice("images", file_name="b.jpg"), "image 0, which stands in .* several"),
  (_set(image_id=1), "is of image 0, but its annotation 0 of image 1"),
  (_set(image_id=True), "an image_id that is no id"),
  (_drop("segmentation"), 'annotation 0 has no "segmentation"'),
  (_set(segmentation=[]), 'annotation 0 has no "segmentation"'),
  (_set(segmentation=None), 'annotation 0 has no "segmentation"'),
  (_set(segmentation=[[1, 1, 2, 2]]), "no part of its polygon"),
  (_set(segmentation=[[1.0, float("nan")] * 3]), "or no number"),
  (_set(segmentation={"size": [20, 30], "counts": [1.5, 598.5]}), "1.5 is no"),
  (_set(segmentation={"size": [30, 20], "counts": COUNTS}), "20x30 pixels but"),
  (_ref(ann_id=None), "names no annotation"),
  (_ref(ann_id=999), "names annotation 999, which"),
  (_ref(image_id=None), "lacks 'image_id'"),
  (_ref(image_id=1), "is of image 1, but its annotation 0 of image 0"),
  (_ref(sentences=[{"sent": 7}]), "a sentence that is no text"),
  (_ref(sentences=[{"sent": "\N{ZERO WIDTH NO-BREAK SPACE} "}]), "an empty"),
  (_ref(no_target=True), "annotations although it has no target"),
]


@pytest.mark.parametrize("number", range(len(COCO_REFUSED)))
def test_annotations_that_are_refused_alone(number, tmp_path):
  """The record with the fault is named by its id; the others stay."""
  change, said = COCO_REFUSED[number]
  rows = _rows(**_coco(tmp_path, change))
  assert not rows(1).error
  assert re.search(f"ref_id 0.*{said}", rows(0).error)


def _as_text(content):
  for entry in (*content["images"], *content["annotations"]):
    entry |= {k: str(v) for k, v in entry.items() if k in ("id", "image_id")}


def _as_floats(content):
  for entry in content["annotations"]:
    entry |= {"id": float(entry["id"])}
  for ref in content["refs"]:
    ref |= {"ann_id": float(ref["ann_id"]), "image_id": str(ref["image_id"])}


COCO_READ = [
  _twice("annotations"),
  _as_text,
  _as_floats,
  _drop("image_id"),
  _set(segmentation=[BOX, [1, 1, 2, 2], []]),
  _set(segmentation=RUNS),
  _set(segmentation={"size": [20, 30], "counts": COUNTS}),
  _set(segmentation={"size": [20.0, "30"], "counts": [*map(float, COUNTS)]}),
  lambda content: content["annotations"].append({"id": None}),
  _ref(sentences=[{"sent": "\N{ZERO WIDTH NO-BREAK SPACE}left box\n"}]),
]


@pytest.mark.parametrize("number", range(len(COCO_READ)))
def test_annotations_that_are_read(number, tmp_path):
  rows = _rows(**_coco(tmp_path, COCO_READ[number]))
  assert not rows(0).error
  sample = rows.source[0]
  np.testing.assert_array_equal(sample.load_seg_mask(), LEFT)
  assert sample.expressions[0] == "left box"
  left_out = sample.read_mask(sample.seg_masks[0]).left_out
  assert left_out == (2 if number == 4 else 0)


def test_references_without_sentences_are_counted_once(tmp_path):
  keys = layouts.write("grefer", tmp_path)
  path = tmp_path / "grefs(unc).json"
  refs = json.loads(path.read_text())
  path.write_text(json.dumps([refs[0] | {"sentences": []}, *refs[1:], {}]))
  rows = _rows(**keys)
  assert rows.source.notes == (
    f"{path}: 1 references without a sentence left out.",
  )
  assert not rows(0).error
  assert "reference 1 of its split lacks" in rows(1).error


def _reason(folder, *shapes, words=("a",), encoding="utf-8"):
  layouts.picture(folder / "train" / "a.jpg", 0)
  record = {"text": list(words), "shapes": list(shapes)}
  (folder / "train" / "a.json").write_bytes(
    json.dumps(record, ensure_ascii=False).encode(encoding)
  )
  return DataConfig(str(folder), source="reason_seg")


def _shape(label, *corners):
  return {"label": label, "points": [list(corner) for corner in corners]}


OUTER = _shape("target", (2, 2), (20, 2), (20, 17), (2, 17))
HOLE = _shape("ignore", (5, 5), (12, 5), (12, 12), (5, 12))


def test_ignored_shapes_are_neither_object_nor_background(tmp_path):
  sample = open_source(_reason(tmp_path, OUTER, HOLE))[0]
  seg_mask, ignore = sample.load_seg_mask(), sample.load_ignore()
  assert ignore[5:13, 5:13].all()
  assert ignore.sum() == 64
  assert not (seg_mask & ignore).any()
  assert (seg_mask | ignore)[2:18, 2:21].all()
  for answer, score in ((seg_mask | ignore, 1.0), (seg_mask & False, 0.0)):
    (line,) = records.records(0, sample, [answer], [seg_mask], text="")
    assert records.Scorer().add(line) == pytest.approx(score)
  smaller = _shape("target", (7, 7), (9, 7), (9, 9), (7, 9))
  sample = open_source(_reason(tmp_path, OUTER, HOLE, smaller))[0]
  assert sample.load_seg_mask()[7:10, 7:10].all()
  assert sample.load_ignore().sum() == 64 - 9
  assert open_source(_reason(tmp_path, OUTER))[0].load_ignore() is None


@pytest.mark.parametrize(
  ("shapes", "keys", "said"),
  [
    (
      [OUTER],
      {"words": ["\N{CJK UNIFIED IDEOGRAPH-7EA2}"], "encoding": "gbk"},
      r"a\.json is not UTF-8",
    ),
    ([_shape("ignor", (1, 1), (5, 1), (5, 5))], {}, "did you mean 'ignore'"),
    ([OUTER | {"label": None}], {}, 'without "label"'),
    ([OUTER], {"words": ["a", 5]}, "5, which is no text"),
    ([OUTER], {"words": ["a", " "]}, "empty expression"),
  ],
)
def test_shapes_that_are_refused(shapes, keys, said, tmp_path):
  source = open_source(_reason(tmp_path, *shapes, **keys))
  with pytest.raises(DataError, match=said):
    source[0]


def test_label_maps_are_read_by_index_and_only_so(tmp_path):
  keys = layouts.write("ade20k", tmp_path)
  file = tmp_path / "annotations" / "training" / "a.png"
  labels = Image.open(file).convert("L")
  indexed = labels.convert("P")
  indexed.putdata(np.array(labels).ravel().tolist())
  indexed.putpalette([9, 9, 9] * 256)
  indexed.save(file)
  sample = open_source(DataConfig(**keys))[0]
  np.testing.assert_array_equal(sample.choose(0).load_seg_mask(), LEFT)
  Image.fromarray(np.array(labels, np.uint16) + np.uint16(256)).save(file)
  with pytest.raises(DataError, match="contains class 25"):
    open_source(DataConfig(**keys))[0]
  labels.convert("RGB").save(file)
  with pytest.raises(DataError, match="mode is RGB"):
    open_source(DataConfig(**keys))[0]
  info = tmp_path / "objectInfo150.txt"
  labels.save(file)
  info.write_text(info.read_text().replace("sky, heaven", "wall"))
  sample = open_source(DataConfig(**keys))[0]
  np.testing.assert_array_equal(sample.choose(0).load_seg_mask(), LEFT | RIGHT)


def test_panoptic_segments_that_are_doubtful(tmp_path):
  keys = layouts.write("coco_panoptic", tmp_path)
  path = tmp_path / "panoptic.json"
  content = json.loads(path.read_text())
  content["categories"].append({"id": 1, "name": "cat"})
  segments = content["annotations"][1]["segments_info"]
  content["annotations"][1]["segments_info"] = [segments[1]] * 2
  path.write_text(json.dumps(content))
  source = open_source(DataConfig(**keys))
  for index, said in ((0, "category 1, which stands"), (1, "65543 twice")):
    with pytest.raises(DataError, match=said):
      source[index]


# ---- what a file does while it is open --------------------------------------


def test_a_file_that_changes_while_it_is_read_is_named(images):
  keys = _written(images / "x.jsonl", [_line()] * 50)
  source = open_source(DataConfig(**keys))
  assert source[49].images
  os.truncate(images / "x.jsonl", 10)
  with pytest.raises(DataError, match=r"x\.jsonl has changed since it was"):
    source[49]
  _written(images / "x.jsonl", [_line()] * 50)
  with pytest.raises(DataError, match=r"x\.jsonl has changed since it was"):
    pickle.loads(pickle.dumps(source))[0]


# ---- layouts ----------------------------------------------------------------


def test_an_unknown_layout_is_named_with_the_nearest():
  with pytest.raises(ConfigError, match=r"'refcoco'.*did you mean 'ref_coco'"):
    open_source(DataConfig("x", source="refcoco"))


@pytest.mark.parametrize("name", registry.LAYOUTS)
def test_every_layout_says_what_it_can_do(name):
  """A new layout is a file and a line of the table; this is its protocol."""
  module, _, kind = registry.LAYOUTS[name].partition(".")
  package = f"{registry.__package__}.{module}"
  source = getattr(__import__(package, fromlist=[kind]), kind)
  assert callable(source.open)
  assert isinstance(source.has_turns, bool)
  if name != "array_record":  # Known when it is opened.
    assert isinstance(source.has_options, bool)


def test_options_that_a_source_does_not_declare_are_no_secret(tmp_path):
  rows = _rows(**layouts.write("ade20k", tmp_path))
  rows.source.has_options = False
  with pytest.raises(TypeError, match="Ade20kSource gives options"):
    rows(0)
