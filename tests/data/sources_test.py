import json
import pickle

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.ref_shapes import builder, requests
from argenseg_jax.data.sources.jsonl import JsonlSource
from argenseg_jax.data.sources.ref_shapes import RefShapesSource


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  return builder.prepare(
    tmp_path_factory.mktemp("shapes"), num_train=60, num_eval=12, image_side=48
  )


def test_ref_shapes_gives_the_records_that_were_drawn(prepared):
  for split, count in (("train", 60), ("val", 12), ("testB", 12)):
    source = RefShapesSource(prepared, split)
    assert len(source) == count
    drawn = requests.iterate_requests(split, count, seed=0, image_side=48)
    for i, record in enumerate(drawn):
      sample = source[i]
      assert sample.index == i
      assert sample.images == (record["image"],)
      assert sample.expressions == tuple(record["expressions"])
      assert sample.kind == record["kind"]
      absent = record["kind"] == "absent"
      assert sample.seg_masks == (() if absent else (record["seg_mask"],))
      assert sample.load_image().shape == (48, 48, 3)
      if not absent:
        assert set(np.unique(sample.load_seg_mask())) == {False, True}


def test_sources_can_be_sent_to_workers(prepared):
  source = RefShapesSource(prepared, "val")
  first = source[3]
  copy = pickle.loads(pickle.dumps(source))
  assert copy[3] == first
  assert copy.fingerprint == source.fingerprint
  assert RefShapesSource(prepared, "train").fingerprint != source.fingerprint


def test_ref_shapes_refusals(prepared, tmp_path):
  with pytest.raises(DataError, match="no split 'tset'; it has "):
    RefShapesSource(prepared, "tset")
  with pytest.raises(DataError, match="contains no finished ref_shapes"):
    RefShapesSource(tmp_path, "val")


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "pictures").mkdir()
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
  seg_mask = np.zeros((20, 30), np.uint8)
  seg_mask[3:9, 4:20] = 1
  Image.fromarray(seg_mask).save(tmp_path / "pictures" / "m.png")
  return tmp_path


def _record(**changes):
  record = {
    "id": 0,
    "image": "pictures/a.png",
    "mask": "pictures/m.png",
    "conversations": [
      {"from": "human", "value": "<image>\nthe box"},
      {"from": "gpt", "value": "<mask>"},
    ],
    "dataset": "own",
  }
  record.update(changes)
  return {k: v for k, v in record.items() if v is not None}


def _write(folder, *records):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path = folder / "data.jsonl"
  path.write_text("\n".join(lines) + "\n")
  return path


def _answer(text):
  return [{"from": "human", "value": "x"}, {"from": "gpt", "value": text}]


def test_jsonl(folder):
  polygon = [[4, 3, 20, 3, 20, 9, 4, 9]]
  runs = {"size": [20, 30], "counts": [83, 6] + [14, 6] * 15 + [211]}
  path = _write(
    folder,
    _record(),
    _record(mask=polygon),
    _record(mask=runs),
    _record(
      mask=["pictures/m.png", polygon, runs],
      conversations=_answer("<mask> <mask> <mask>"),
    ),
    _record(mask=None, conversations=_answer("none")),
    _record(image=None, mask=None, conversations=_answer("hello")),
    "",
  )
  source = JsonlSource(path)
  assert len(source) == 6
  assert [len(s.seg_masks) for s in source] == [1, 1, 1, 3, 0, 0]
  assert [len(s.images) for s in source] == [1, 1, 1, 1, 1, 0]
  assert source[0].dataset == "own"
  assert source[0].load_image().shape == (20, 30, 3)
  truth = source[0].load_seg_mask() > 0
  assert truth.sum() == 6 * 16
  for index, number in ((1, 0), (2, 0), (3, 0), (3, 1), (3, 2)):
    got = source[index].load_seg_mask(number) > 0
    np.testing.assert_array_equal(got, truth, err_msg=f"{index} {number}")


def test_jsonl_root(folder):
  path = folder / "elsewhere"
  path.mkdir()
  path = _write(path, _record())
  assert len(JsonlSource(path, root=folder)) == 1
  with pytest.raises(DataError, match=r"cannot read .*a\.png"):
    JsonlSource(path)[0].load_image()


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ("{not json", "line 2 is not JSON"),
    ("[1]", "line 2 is not a JSON object"),
    (_record(image="../secret.png"), "line 2 names '../secret.png', which is"),
    (_record(image="/etc/passwd"), "line 2 names '/etc/passwd', which is"),
    (_record(image=7), "line 2 names a file by 7"),
    (_record(conversations=None), 'line 2 needs "conversations"'),
    (_record(conversations=[{"from": "cat", "value": ""}]), "line 2 needs"),
    (_record(mask=None), "line 2 has 0 masks but 1 <mask>"),
    (_record(conversations=_answer("no")), "line 2 has 1 masks but 0 <mask>"),
  ],
)
def test_bad_lines_are_named(folder, bad, message):
  source = JsonlSource(_write(folder, _record(), bad))
  assert source[0].dataset == "own"
  with pytest.raises(DataError, match=message):
    source[1]


def test_unusable_jsonl_files_are_named(tmp_path):
  with pytest.raises(DataError, match=r"cannot read .*no\.jsonl: No such file"):
    JsonlSource(tmp_path / "no.jsonl")
  (tmp_path / "empty.jsonl").write_text("\n\n")
  with pytest.raises(DataError, match=r"empty\.jsonl contains no records"):
    JsonlSource(tmp_path / "empty.jsonl")
  (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
  with pytest.raises(DataError, match="line 1 is not UTF-8"):
    JsonlSource(tmp_path / "latin.jsonl")[0]
