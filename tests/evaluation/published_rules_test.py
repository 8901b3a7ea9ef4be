"""The numbers that benchmarks' own scripts would give, beside ours."""

import pytest

from argenseg_jax.evaluation import published_rules
from argenseg_jax.evaluation.vqa_metrics import UnderstandingSums, score_answer


def _results(*asked):
  sums = UnderstandingSums()
  for kind, text, answers, *question in asked:
    sums += score_answer(kind, text, answers, question="".join(question))[0]
  return sums.results()


def test_pope_takes_everything_but_no_and_not_for_yes():
  found = _results(
    ("yes_no", "There is not a dog in the image.", ["no"]),
    ("yes_no", "A dog is visible.", ["yes"]),
    ("yes_no", "No.", ["yes"]),
    ("yes_no", "Yes. No cat, though.", ["yes"]),
    ("yes_no", "maybe", ["no"]),
  )
  assert found["pope_accuracy"] == 3 / 5
  assert found["pope_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
  assert found["pope_yes_share"] == 3 / 5
  assert found["yes_no_accuracy"] == 1 / 5  # Neither word: wrong.


@pytest.mark.parametrize(
  ("said", "accuracy"),
  [
    ("red", (3 * 2 / 3 + 7) / 10),  # Each of the three sees two others.
    ("The Blue.", 1),
    ("two", (2 * 1 / 3 + 8 * 2 / 3) / 10),
    ("dog", 0),
  ],
)
def test_vqa_leaves_each_person_out_once(said, accuracy):
  people = ["red"] * 3 + ["blue"] * 5 + ["2"] * 2
  assert published_rules.vqa(said, people) == pytest.approx(accuracy)


@pytest.mark.parametrize(
  ("said", "known"),
  [
    ("dont", "don't"),
    ("left-hand", "left hand"),
    ("1,000", "1000"),
    ("an apple!", "apple"),
    ("5", "-5"),  # As published; our own number tells them apart.
  ],
)
def test_vqa_compares_in_its_normal_form(said, known):
  people = [known] * 4 + ["x"] * 6
  assert published_rules.vqa(said, people) == 1
  assert published_rules.vqa(said, [known] * 10) == 0  # All the same: as it is.


OPTIONS = {"A": "cat", "B": "dog", "C": "cow"}


@pytest.mark.parametrize(
  ("said", "letters"),
  [
    ("B.", ["B"]),
    ("(A) or (C)", ["C"]),
    ("A or B", ["B"]),
    ("I believe this must be a dog", ["B"]),
    ("it is a dog", ["A", "B", "C"]),  # Five words or fewer: it guesses.
    ("A dog", ["A"]),  # The article, as published.
  ],
)
def test_mmmu_takes_the_last_option_named_or_guesses(said, letters):
  assert published_rules.mmmu(said, OPTIONS) == letters


@pytest.mark.parametrize(
  ("said", "letter"),
  [
    ("B", "B"),
    ("B. dog", "B"),
    ("The answer is C.", "C"),
    ("the answer is C", None),
    ("dog", None),
  ],
)
def test_science_qa_takes_a_letter_in_its_place(said, letter):
  assert published_rules.science_qa(said, OPTIONS) == letter


def test_choices_have_three_numbers():
  question = "?\nA. cat\nB. dog\nC. cow"
  found = _results(
    ("choice", "dog", ["B"], question), ("choice", "B", ["B"], question)
  )
  assert found["choice_accuracy"] == 1
  assert found["mmmu_accuracy"] == pytest.approx((1 + 1 / 3) / 2)
  assert found["scienceqa_accuracy"] == 1 / 2


def test_every_number_names_its_rule():
  question = "?\nA. cat\nB. dog"
  found = _results(
    ("choice", "B", ["B"], question),
    ("yes_no", "yes", ["yes"]),
    ("vqa", "red", ["red"] * 10),
    ("text", "red", ["red"]),
  )
  assert published_rules.RULES.keys() <= found.keys()
