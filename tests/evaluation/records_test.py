"""Records hold all that the metrics need."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.evaluation import records, resume
from argenseg_jax.evaluation.segmentation_metrics import score
from argenseg_jax.tools import cli


def _records(count=7):
  rng = np.random.default_rng(3)
  made, pairs = [], []
  for index in range(count):
    shape = (5 + index, 9)
    truth, prediction = (rng.random((2, *shape)) > 0.6)[:]
    if index == 2:
      truth = np.zeros(shape, bool)
    has_mask = index != 4
    if not has_mask:
      prediction = np.zeros(shape, bool)
    sample = Sample(
      index=index,
      dataset="toy",
      images=(),
      seg_masks=(),
      expressions=("the cup",),
      image_keys=(f"{index // 2}.jpg",),
    )
    pairs.append((prediction, truth, has_mask))
    answered = [prediction] if has_mask else []
    made += records.records(index, sample, answered, [truth], text="Sure.")
  return made, pairs


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "predictions.jsonl"
  made, _ = _records()
  path.write_text("".join(json.dumps(r) + "\n" for r in made))
  return path


def test_rescoring_gives_the_metrics_of_the_masks_themselves(file):
  _, pairs = _records()
  sums = sum(
    (score(p, t, has_mask=has) for p, t, has in pairs[1:]),
    score(*pairs[0][:2], has_mask=pairs[0][2]),
  )
  expected = sums.results()
  actual = records.rescore(file)
  assert {k: actual[k] for k in expected} == expected
  assert actual["ciou_low"] <= actual["ciou"] <= actual["ciou_high"]


def test_words_are_scored_again_too(file):
  with file.open("a") as lines:
    for sample, text in enumerate(("yes", "no"), 9):
      question = {"question": "red?", "answers": ["yes"], "kind": "yes_no"}
      common = {"sample": sample, "picture": "p.jpg", "text": text}
      lines.write(json.dumps(question | common) + "\n")
  found = records.rescore(file)
  assert found["yes_no_accuracy"] == 0.5
  assert found["samples"] == 7


def test_masks_are_paired_in_order():
  left, right = np.eye(4, dtype=bool), np.eye(4, dtype=bool)[::-1]
  sample = Sample(index=0, dataset="toy", images=(), seg_masks=(left, right))
  missing = records.records(0, sample, [left], [left, right], text="")
  surplus = records.records(0, sample, [left, right], [left], text="")
  assert [r["has_mask"] for r in missing] == [True, False]
  scorer = records.Scorer()
  assert [scorer.add(r) for r in missing] == [pytest.approx(1), 0]
  assert scorer.results()["invalid"] == 1
  assert "surplus" not in scorer.results()
  scorer.add(surplus[0])
  assert scorer.results()["surplus"] == 1


def test_pycocotools_alone_gives_the_same_ciou(file):
  shared = union = 0
  for line in file.read_text().splitlines():
    record = json.loads(line)
    pair = [record["mask"], record["truth"]]
    shared += int(coco.area(coco.merge(pair, intersect=True)))
    union += int(coco.area(coco.merge(pair)))
  assert records.rescore(file)["ciou"] == pytest.approx(shared / union)


def test_the_command_prints_what_rescoring_gives(file, capsys):
  assert cli.main(["eval", f"--rescore={file}"]) == 0
  ciou = records.rescore(file)["ciou"]
  assert f"{ciou:.4f}" in capsys.readouterr().out


def test_an_interrupted_file_is_cut_to_whole_batches(file):
  whole = [json.loads(line) for line in file.read_text().splitlines()]
  with file.open("a") as lines:
    lines.write('{"sample": 7, "tex')
  kept = resume.keep_whole_batches(file, 3)
  assert kept == whole[:6]
  assert [json.loads(x) for x in file.read_text().splitlines()] == kept


def test_nothing_was_answered_before_the_first_batch(tmp_path):
  path = tmp_path / "predictions.jsonl"
  assert resume.keep_whole_batches(path, 4) == []
  assert path.read_text() == ""


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "contains no answered sample"),
    ("{}\n", r"jsonl:1 is not an answered sample"),
    ("nonsense\n", r"jsonl:1 is not an answered sample"),
    (
      '{"sample": 0, "picture": [], "text": "", "kind": "vqa",'
      ' "question": "", "answers": [""]}\n',
      r"jsonl:1 .*picture \[\] is no name",
    ),
  ],
)
def test_a_file_of_something_else_is_named(text, message, tmp_path):
  path = tmp_path / "predictions.jsonl"
  path.write_text(text)
  with pytest.raises(DataError, match=message):
    records.rescore(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(DataError, match=r"absent\.jsonl cannot be read"):
    records.rescore(tmp_path / "absent.jsonl")


def test_ignored_pixels_count_as_neither(tmp_path):
  """ReasonSeg's rule: an answer may fill the hole or leave it."""
  truth = np.zeros((6, 8), bool)
  truth[1:5, 1:7] = True
  ignore = np.zeros_like(truth)
  ignore[2:4, 2:6] = True
  truth &= ~ignore
  for answer in (truth, truth | ignore):
    one = score(answer, truth, ignore=ignore)
    assert one.iou == pytest.approx(1)
    assert one.union == truth.sum()
  record = {
    "sample": 0,
    "picture": "p",
    "text": "<mask>",
    "has_mask": True,
    "mask": masks.run_lengths(truth | ignore),
    "truth": masks.run_lengths(truth),
  }
  path = tmp_path / records.FILE
  for more, ciou in (({}, 16 / 24), ({"ignore": masks.run_lengths(ignore)}, 1)):
    path.write_text(json.dumps(record | more))
    assert records.rescore(path)["ciou"] == pytest.approx(ciou)
  with pytest.raises(ValueError, match="ignored pixels"):
    score(truth, truth, ignore=ignore[1:])
