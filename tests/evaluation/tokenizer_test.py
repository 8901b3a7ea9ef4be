"""Boundary F, perplexity and the ceiling's sums."""

import numpy as np
import pytest

from argenseg_jax.evaluation import tokenizer


def square(top, left, side=10, shape=(40, 60)):
  made = np.zeros(shape, bool)
  made[top : top + side, left : left + side] = True
  return made


def test_boundary_f_allows_a_pixel_and_no_more():
  truth, empty = square(5, 5), np.zeros((40, 60), bool)
  assert tokenizer.boundary_f(truth, truth) == 1
  assert tokenizer.boundary_f(square(6, 5), truth) == 1  # Off by one.
  assert tokenizer.boundary_f(square(25, 40), truth) == 0
  assert tokenizer.boundary_f(empty, truth) == 0
  assert tokenizer.boundary_f(empty, empty) == 1
  # A square of half the side in its corner: all of its own boundary that lies
  # on the other's is right.
  found = tokenizer.boundary_f(square(5, 5, side=5), truth)
  own = tokenizer._edge(square(5, 5, side=5)).sum()
  assert own == 16
  assert 0 < found < 1


def test_sums_are_divided_once_for_each_prefix():
  truth = square(5, 5)
  one = tokenizer.ceiling_score([square(25, 40), truth], truth)
  two = tokenizer.ceiling_score([truth, truth], truth)
  first, last = (one + two).results()
  assert first["ciou"] == pytest.approx(100 / 300)
  assert first["giou"] == first["boundary_f"] == 0.5
  assert last == {"ciou": pytest.approx(1), "giou": 1, "boundary_f": 1}


def test_perplexity_is_how_many_equal_codes_would_be():
  assert tokenizer.perplexity(np.array([3, 3, 0, 3])) == pytest.approx(3)
  assert tokenizer.perplexity(np.array([7, 0])) == 1


def test_images_are_scored_by_psnr():
  truth = np.full((4, 4, 3), 100, np.uint8)
  one = tokenizer.image_score(np.stack((truth + 51, truth + 5)), truth)
  two = tokenizer.image_score(np.stack((truth + 51, truth)), truth)
  first, last = (one + two).results()
  assert first == {"psnr": pytest.approx(20 * np.log10(5))}
  best = 20 * np.log10(255 / 0.1)  # Equal images: the mean error's floor.
  assert last["psnr"] == pytest.approx((20 * np.log10(51) + best) / 2)
