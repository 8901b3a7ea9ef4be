"""Metrics: definitions, and sums that merge in any order."""

import functools
import operator

import numpy as np
import pytest

from argenseg_jax.metrics import SegmentationSums, overlap, score


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
