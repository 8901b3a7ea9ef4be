"""Answers in words as they are compared: equal where they mean the same."""

import json
import unicodedata

import pytest

from argenseg_jax.evaluation import records, short_answers
from argenseg_jax.evaluation.vqa_metrics import score_answer


@pytest.mark.parametrize(
  "same",
  [
    ("The Cat!", "cat", " a cat.", "“cat”", "**cat**", "CAT"),
    ("two dogs", "2 dogs"),
    ("1,000", "1000"),
    ("1,234,567", "1234567"),
    ("it's 3.5.", "its 3.5"),
    ("left-hand", "left hand", "left–hand"),
    (".5", "0.5"),
    ("-5", "−5", "- 5".replace(" ", "")),
    ("café", "cafe\u0301", "CAFÉ"),
    ("Straße", "STRASSE"),
    ("5 °C", "5°C", "5 ° c"),
    ("नमस्ते।", "नमस्ते"),
    ("1, 2, 3", "1 2 3"),
  ],
)
def test_equal_answers(same):
  assert len({short_answers.normalize(text) for text in same}) == 1


@pytest.mark.parametrize(
  "different",
  [
    ("", "A", "the", "I"),
    ("5", "-5", "+5", "5%", "$5", "0.5", ".05", "5°", '5"', "€5"),
    ("C", "C#", "C++", "C+"),
    ("3.5", "35", "3,5", "3:5", "3/5", "3-5"),
    ("दो", "दी", "द"),
    ("ไม้", "ไม่", "ไม"),
    ("கா", "கி", "க"),
    ("ব", "বি"),
    ("cafe", "café"),
    ("vitamin A", "vitamin", "vitamin C"),
    ("x", "x²", "x2"),
    ("🐕", "🐈", ""),
    ("5 - 3", "5 3"),
    ("!", "?"),
    ("1,5", "15"),
  ],
)
def test_different_answers(different):
  found = [short_answers.normalize(text) for text in different]
  assert len(set(found)) == len(different), found
  for said in different:
    for true in filter(None, different):
      assert score_answer("text", said, [true])[1] == float(said == true)


def test_a_normal_form_is_its_own():
  for text in (
    "The Cat!",
    "-5",
    "C++",
    "5 °C",
    "it's 3.5.",
    "दी",
    "a",
    "10:30",
  ):
    once = short_answers.normalize(text)
    assert short_answers.normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)


ANIMALS = "What is it?\nA. a cat\n(B) a dog\nC: a gray cow"
TEMPERATURES = "How warm?\nA. 5 °C\nB. 25 °C\nC. 35 °C"
VITAMINS = "Which?\nA. Vitamin C\nB. Vitamin B\nC. Vitamin D"
LETTERS = "Which letter is on the sign?\nA. B\nB. C\nC. A"
NUMBERS = "How many?\nA. 2\nB. 1\nC. -2"
NESTED = "Which?\nA. cat\nB. cat and dog\nC. dog"


@pytest.mark.parametrize(
  ("question", "said", "letter"),
  [
    (ANIMALS, "B", "B"),
    (ANIMALS, "(b)", None),
    (ANIMALS, " C. ", "C"),
    (ANIMALS, "**B**", "B"),
    (ANIMALS, "The answer is (C).", "C"),
    (ANIMALS, "Answer: A", "A"),
    (ANIMALS, "The answer is a dog.", "B"),
    (ANIMALS, "Answer: a gray cow", "C"),
    (ANIMALS, "A dog", "B"),
    (ANIMALS, "The correct answer is option C, a gray cow", "C"),
    (ANIMALS, "B. a dog", "B"),
    (ANIMALS, "B. a cat", None),
    (ANIMALS, "I think it is a dog", "B"),
    (ANIMALS, "a gray cow, I guess", "C"),
    (ANIMALS, "a cat or a dog", None),
    (ANIMALS, "D", None),
    (ANIMALS, "", None),
    (ANIMALS, "A small animal", None),
    (TEMPERATURES, "5 °C", "A"),
    (TEMPERATURES, "5°C", "A"),
    (TEMPERATURES, "The answer is 25 °C", "B"),
    (TEMPERATURES, "about 35 °C", "C"),
    (TEMPERATURES, "°C", None),
    (TEMPERATURES, "C", "C"),
    (VITAMINS, "Vitamin C", "A"),
    (VITAMINS, "It is vitamin B.", "B"),
    (VITAMINS, "A", "A"),
    (VITAMINS, "C", "C"),
    (LETTERS, "B", "B"),
    (LETTERS, "The answer is B.", "B"),
    (NUMBERS, "2", "A"),
    (NUMBERS, "-2", "C"),
    (NUMBERS, "one", "B"),
    (NESTED, "a cat and a dog", "B"),
    (NESTED, "cat and dog", "B"),
    (NESTED, "I see the cat and dog", "B"),
    (NESTED, "dog", "C"),
    ("No options here", "The answer is B", "B"),
  ],
)
def test_an_option_is_named_by_letter_or_text(question, said, letter):
  options = short_answers.options_of(question)
  assert short_answers.chosen(said, options) == letter


@pytest.mark.parametrize(
  ("question", "answer", "letter"),
  [
    (ANIMALS, "B", "B"),
    (ANIMALS, "(b)", "B"),
    (ANIMALS, "a dog", "B"),
    (ANIMALS, "Dog", "B"),
    (ANIMALS, "D", None),
    (ANIMALS, "1", None),
    (VITAMINS, "Vitamin C", "A"),
    (NUMBERS, "1", "B"),
    (NESTED, "cat", "A"),
  ],
)
def test_a_true_answer_is_a_letter_or_a_text(question, answer, letter):
  options = short_answers.options_of(question)
  assert short_answers.true_option(answer, options) == letter


@pytest.mark.parametrize(
  ("text", "word"),
  [("Yes.", "yes"), ("no ", "no"), ("NO!", "no"), ("nó", None), ("note", None)],
)
def test_yes_and_no(text, word):
  assert short_answers.yes_or_no(text) == word
  assert short_answers.yes_or_no(unicodedata.normalize("NFD", text)) == word


def test_files_are_scored_again_by_the_same_rules(tmp_path):
  """As in users' predictions.jsonl: right answers 1, wrong answers 0."""
  right = [
    ("choice", TEMPERATURES, "5 °C", "A"),
    ("choice", ANIMALS, "The answer is a dog.", "B"),
    ("choice", VITAMINS, "A", "Vitamin C"),
    ("text", "?", "cafe\u0301", "café"),
    ("yes_no", "?", "Yes, it is", "Yes."),
  ]
  wrong = [
    ("choice", TEMPERATURES, "5 °C", "C"),
    ("choice", ANIMALS, "The answer is a dog.", "A"),
    ("text", "Which letter?", "", "A"),
    ("text", "?", "ไม้", "ไม่"),
    ("yes_no", "?", "Yes", "no "),
  ]
  for cases, score in ((right, 1.0), (wrong, 0.0)):
    path = tmp_path / "predictions.jsonl"
    lines = [
      {"sample": i, "picture": str(i), "text": said, "kind": kind}
      | {"question": question, "answers": [true]}
      for i, (kind, question, said, true) in enumerate(cases)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = records.rescore(path)
    for name in ("choice_accuracy", "text_exact", "yes_no_accuracy"):
      assert found[name] == score
