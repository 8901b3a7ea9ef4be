"""Metrics: definitions, and sums that merge in any order."""

import functools
import operator

import numpy as np
import pytest

from argenseg_jax.data import boxes
from argenseg_jax.evaluation.bootstrap import intervals
from argenseg_jax.evaluation.segmentation_metrics import (
  SegmentationSums,
  overlap,
  score,
)


def seg_mask(rows):
  out = np.zeros((4, 4), bool)
  out[rows] = True
  return out


def test_ciou_sums_before_it_divides_and_giou_after():
  half = score(seg_mask(slice(0, 2)), seg_mask(slice(0, 1)))  # IoU 4 / 8.
  full = score(seg_mask(slice(0, 4)), seg_mask(slice(0, 4)))  # IoU 16 / 16.
  results = (half + full).results()
  assert results["ciou"] == pytest.approx(20 / 24)
  assert results["giou"] == pytest.approx(0.75)
  assert results["pr@0.5"] == 0.5  # 0.5 is not above 0.5.
  assert results["pr@0.9"] == 0.5


def test_empty_truth_counts_as_right_only_when_the_answer_is_empty():
  nothing = seg_mask(slice(0, 0))
  right = score(nothing, nothing, has_mask=False)
  wrong = score(seg_mask(slice(0, 1)), nothing)
  results = (right + wrong).results()
  assert results["giou"] == 0.5
  assert results["n_acc"] == 0.5
  assert results["ciou"] == 0.0
  assert results["invalid"] == 0
  assert "t_acc" not in results


def test_an_answer_without_a_mask_is_invalid_where_there_is_a_target():
  missing = score(seg_mask(slice(0, 0)), seg_mask(slice(0, 2)), has_mask=False)
  results = missing.results()
  assert results["invalid"] == 1
  assert results["ciou"] == 0.0
  assert results["t_acc"] == 0.0


def test_merging_is_associative_and_equals_one_pass():
  rng = np.random.default_rng(0)
  parts = [
    score(rng.random((5, 7)) > 0.5, rng.random((5, 7)) > 0.5) for _ in range(6)
  ]
  left = functools.reduce(operator.add, parts, SegmentationSums())
  right = sum(parts[:3], SegmentationSums()) + sum(
    parts[3:], SegmentationSums()
  )
  assert left.results() == pytest.approx(right.results())


def test_masks_of_two_sizes_are_refused():
  with pytest.raises(ValueError, match="differ in size"):
    overlap(np.zeros((2, 2), bool), np.zeros((2, 3), bool))


TRUTHS = [seg_mask(slice(0, 1)), seg_mask(slice(0, 4)), seg_mask(slice(0, 0))]


@pytest.mark.parametrize(
  ("answer", "has_mask", "wanted"),
  [
    # Truths of 4, 16 and 0 of 16 pixels.
    ("empty", True, dict(ciou=0, giou=1 / 3, t_acc=0, n_acc=1, invalid=0)),
    ("empty", False, dict(ciou=0, giou=1 / 3, t_acc=0, n_acc=1, invalid=2)),
    (
      "full",
      True,
      {
        **dict(ciou=20 / 48, giou=(4 / 16 + 1 + 0) / 3, t_acc=1, n_acc=0),
        **{"invalid": 0, "pr@0.5": 1 / 3, "box_acc@0.5": 0.5},
      },
    ),
  ],
)
def test_models_that_do_not_look(answer, has_mask, wanted):
  prediction = seg_mask(slice(0, 4 if answer == "full" else 0))
  results = sum(
    (score(prediction, truth, has_mask=has_mask) for truth in TRUTHS),
    SegmentationSums(),
  ).results()
  assert {name: results[name] for name in wanted} == pytest.approx(wanted)


def test_boxes_of_masks_and_of_text():
  truth = np.zeros((10, 20), bool)
  truth[2:4, 5:15] = True
  assert boxes.mask_box(truth) == (0.25, 0.2, 0.75, 0.4)
  assert boxes.mask_box(np.zeros((2, 2), bool)) is None
  said = "<box>[[250, 200, 750, 400]]</box>"
  assert boxes.text_box(said) == (0.25, 0.2, 0.75, 0.4)
  assert boxes.text_box("at (750, 400), (250, 200)") == boxes.text_box(said)
  assert boxes.text_box("[0.25, 0.2, 0.75, 0.4]") == boxes.text_box(said)
  assert boxes.text_box("3 of 4, 5") is None
  # A mask that misses but whose box is right, and a box in text that is not.
  corners = np.zeros_like(truth)
  corners[2, 5] = corners[3, 14] = True
  one = score(corners, truth, text="[[0, 0, 500, 400]]")
  results = one.results()
  assert results["ciou"] == pytest.approx(0.1)
  assert results["box_acc@0.5"] == 1.0
  assert results["text_box_acc@0.5"] == 0.0  # 0.05 / 0.25.
  assert "text_box_acc@0.5" not in score(corners, truth).results()


def test_intervals_draw_whole_pictures():
  rng = np.random.default_rng(0)
  masks = [(rng.random((6, 6)) > 0.5, rng.random((6, 6)) > 0.3)] * 40
  equal = [score(a, b) for a, b in masks]
  low, high = intervals(equal, range(40))["ciou"]
  assert low == pytest.approx(high)  # All samples alike.
  half = seg_mask(slice(0, 2))
  mixed = [score(half, half), score(half, seg_mask(slice(2, 4)))] * 50
  by_sample = intervals(mixed, range(100))["giou"]
  assert by_sample[0] < 0.5 < by_sample[1]
  # A normal approximation: 0.5 +- 1.96 x 0.5 / sqrt(100).
  assert by_sample == pytest.approx((0.4, 0.6), abs=0.03)
  pairs = intervals(mixed, [i // 2 for i in range(100)])["giou"]
  assert pairs == pytest.approx((0.5, 0.5))  # Each picture has one of each.
  assert intervals(mixed, range(100)) == intervals(mixed, range(100))
  assert "invalid" not in intervals(mixed, range(100))
