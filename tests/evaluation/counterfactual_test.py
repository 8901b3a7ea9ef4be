"""Whether masks follow the request."""

import numpy as np
import pytest

from argenseg_jax.data import masks
from argenseg_jax.evaluation import records
from argenseg_jax.evaluation.bootstrap import COUNTS
from argenseg_jax.evaluation.counterfactual import FollowSums, Pairs


def box(left: int, right: int) -> np.ndarray:
  mask = np.zeros((8, 12), bool)
  mask[2:6, left:right] = True
  return mask


A, B, NOTHING = box(0, 4), box(6, 10), box(0, 0)
# Answers to requests of one image, (request, mask, truth) -> the sums.
CASES = {
  "both move": ([(0, A, A), (1, B, B)], (2, 2, 0, 0)),
  "one mask for all": ([(0, A, A), (1, A, B)], (2, 1, 0, 0)),
  "swapped": ([(0, B, A), (1, A, B)], (2, 0, 0, 0)),
  "everything": ([(0, A | B, A), (1, A | B, B)], (2, 0, 0, 0)),
  "no mask": ([(0, NOTHING, A), (1, NOTHING, B)], (2, 0, 0, 0)),
  "one object, two wordings": ([(0, A, A), (1, B, box(0, 5))], (0, 0, 0, 0)),
  "two masks of one answer": ([(0, A, A), (0, B, B)], (0, 0, 0, 0)),
  "absent, empty": ([(0, A, A), (1, NOTHING, NOTHING)], (0, 0, 1, 1)),
  "absent, drawn": ([(0, A, A), (1, A, NOTHING)], (0, 0, 1, 0)),
  "two absent": ([(0, A, NOTHING), (1, A, NOTHING)], (0, 0, 0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_pairs_of_an_image(case):
  answers, wanted = CASES[case]
  pairs = Pairs()
  for request, prediction, truth in answers:
    pairs.add("image", request, prediction, truth)
    pairs.add(f"alone {request}", request, prediction, truth)
  found = sum(pairs.sums().values(), FollowSums())
  assert tuple(vars(found).values()) == wanted


def test_scored_records_have_it_beside_ciou():
  def record(sample, image, prediction, truth):
    coded = {"mask": prediction, "truth": truth}
    coded = {k: masks.run_lengths(v) for k, v in coded.items()}
    seen = {"sample": sample, "picture": image, "text": "", "has_mask": True}
    return seen | coded

  scorer = records.Scorer()
  for n, image in enumerate("ab"):
    scorer.add(record(3 * n, image, A, A))
    scorer.add(record(3 * n + 1, image, B if n else A, B))
    scorer.add(record(3 * n + 2, image, NOTHING, NOTHING))
  found = scorer.results()
  assert found["follows"] == 3 / 4
  assert found["follows_absent"] == 1
  assert found["follows_pairs"] == 8
  assert found["follows_low"] == 0.5
  assert found["follows_high"] == 1
  assert "follows_pairs" in COUNTS


def test_images_asked_about_once_have_none():
  scorer = records.Scorer()
  assert not any(name.startswith("follows") for name in scorer.results())
