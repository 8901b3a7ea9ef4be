"""Answers in words: what counts as right, and sums that merge."""

import pytest

from argenseg_jax.evaluation.vqa_metrics import UnderstandingSums, score_answer


def results(*asked):
  sums = UnderstandingSums()
  for kind, text, answers, *question in asked:
    sums += score_answer(kind, text, answers, question="".join(question))[0]
  return sums.results()


def test_yes_or_no_as_pope_counts_it():
  found = results(
    ("yes_no", "Yes, there is.", ["yes"]),
    ("yes_no", "yes", ["no"]),
    ("yes_no", "No.", ["no"]),
    ("yes_no", "no", ["yes"]),
    ("yes_no", "a cat", ["yes"]),
  )
  assert found["yes_no_accuracy"] == 2 / 5
  assert found["yes_no_f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))
  assert found["yes_share"] == 2 / 5
  assert found["yes_no_unclear"] == 1


@pytest.mark.parametrize(
  ("said", "soft", "exact"),
  [("red", 1, 0), ("The Blue.", 1, 1), ("two", 2 / 3, 0), ("dog", 0, 0)],
)
def test_vqa_counts_people_who_said_the_same(said, soft, exact):
  people = ["red"] * 3 + ["blue"] * 5 + ["2"] * 2
  found = results(("vqa", said, people))
  assert found["vqa_soft"] == pytest.approx(soft)
  assert found["vqa_exact"] == exact


QUESTION = "What is it?\nA. a cat\n(B) a dog\nC: a gray cow"


def test_multiple_choice_text_and_captions():
  found = results(
    ("choice", "C", ["C"], QUESTION),
    ("choice", "a dog", ["C"], QUESTION),
    ("choice", "none of them", ["A"], QUESTION),
    ("text", "Two", ["2"]),
    ("text", "red", ["blue"]),
    ("caption", "a room", ["a kitchen"]),
  )
  assert found["choice_accuracy"] == 1 / 3
  assert found["choice_unclear"] == 1
  assert found["text_exact"] == 0.5
  assert found["captions"] == 1
  assert found["questions"] == 6
  assert "vqa_soft" not in found


@pytest.mark.parametrize(
  ("kind", "answers"), [("text", []), ("yes_no", ["cat"]), ("choice", ["D"])]
)
def test_a_question_without_a_usable_answer_is_refused(kind, answers):
  with pytest.raises(ValueError, match="true answer"):
    score_answer(kind, "x", answers, question=QUESTION)
