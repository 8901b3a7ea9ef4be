"""COCO's, ReasonSeg's and panoptic annotations as people really have them: what
is read, and what is refused and why."""

import json
import pickle
import re

import numpy as np
import pytest
from data import layouts
from PIL import Image

from argenseg_jax.config import DataConfig
from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.evaluation import records

LEFT, RIGHT = layouts.LEFT, layouts.RIGHT


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
  rows = layouts.rows(**_coco(tmp_path, change))
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
  rows = layouts.rows(**_coco(tmp_path, COCO_READ[number]))
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
  rows = layouts.rows(**keys)
  assert rows.source.notes == (
    f"{path}: 1 references without a sentence left out.",
  )
  assert not rows(0).error
  assert "reference 1 of its split lacks" in rows(1).error


def _reason(folder, *shapes, words=("a",), encoding="utf-8"):
  layouts.image(folder / "train" / "a.jpg", 0)
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
