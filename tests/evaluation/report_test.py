"""The page of an evaluation: what is chosen, counted and drawn."""

import numpy as np

from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.evaluation import records, report


def _records():
  """Twelve answers: IoU 1, .5, 0 in turn; the last two have no target."""
  left, right = np.zeros((2, 8, 8), bool)
  left[:4], right[4:] = True, True
  made = []
  for index in range(12):
    truth = left if index < 10 else np.zeros_like(left)
    answer = [left, left | right, right][index % 3]
    sample = Sample(
      index=index,
      dataset="toy",
      images=(),
      seg_masks=(truth,),
      expressions=(" ".join(["word"] * (index + 1)),),
    )
    answered = [] if index in (9, 11) else [answer]
    made += records.records(index, sample, answered, [truth], text="")
  scorer = records.Scorer()
  for record in made:
    record["iou"] = scorer.add(record)
  return made


def test_best_worst_and_others_are_of_different_images():
  found = report.choose(_records(), 3)
  assert [round(r["iou"], 6) for r in found["best"]] == [1, 1, 1]
  assert [r["iou"] for r in found["worst"]] == [0, 0, 0]
  names = [r["sample"] for part in found.values() for r in part]
  assert len(names) == len(set(names)) == 9
  few = report.choose(_records()[:2], 3)
  assert list(few) == ["best"]


def test_answers_are_counted_by_sort():
  found = report.confusion(_records())
  assert found == {
    "target": {
      "mask that meets it": 6,
      "mask elsewhere": 3,
      "empty mask": 0,
      "no mask": 1,
    },
    "no target": {
      "mask that meets it": 0,
      "mask elsewhere": 1,
      "empty mask": 0,
      "no mask": 1,
    },
  }


def test_distributions_are_drawn():
  drawn = report.distributions(_records())
  assert drawn.dtype == np.uint8
  assert drawn.shape[2] == 3
  assert drawn.min() < 100
