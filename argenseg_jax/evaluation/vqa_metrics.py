"""Answers in words, scored: yes or no, VQA, multiple choice, exact text.

docs/evaluation.md has the definitions. Nothing here reads a model or pictures.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from argenseg_jax.evaluation.segmentation_metrics import Sums, plain, share

KINDS = ("yes_no", "vqa", "choice", "caption", "text")

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3"} | {
  **{"four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"},
  **{"nine": "9", "ten": "10"},
}
_ARTICLES = ("a", "an", "the")
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
# "A. a cat", "(B) a dog", "C: a cow", one a line of the question.
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)
# From the surest to the least sure way to name an option.
_LETTERS = (
  re.compile(r"^\W*([A-Z])\W*$"),
  re.compile(r"answer(?:\s+is)?\s*:?\s*\(?([A-Z])\b(?!')", re.IGNORECASE),
  re.compile(r"\(([A-Z])\)"),
  re.compile(r"^\s*([A-Z])[.):]"),
  re.compile(r"\b([B-HJ-Z])\b(?!')"),  # "A" and "I" are words, too.
)


@dataclasses.dataclass
class UnderstandingSums(Sums):
  """Sums over questions that are answered in words.

  Attributes:
    questions: that were asked.
    yes_right, yes_wrong: answers "yes", by whether that is true.
    no_right, no_wrong: answers "no".
    unclear_yes, unclear_no: true "yes" and "no" answered with neither.
    vqa: questions with several people's answers.
    vqa_exact: whose answer equals the commonest of them.
    vqa_soft: sum of min(equal answers / 3, 1).
    choices, choices_right, choices_unclear: of multiple choice; unclear answers
      name no option.
    texts, texts_right: answers that must equal the true one.
    captions: answers that are only written out.
  """

  questions: int = 0
  yes_right: int = 0
  yes_wrong: int = 0
  no_right: int = 0
  no_wrong: int = 0
  unclear_yes: int = 0
  unclear_no: int = 0
  vqa: int = 0
  vqa_exact: int = 0
  vqa_soft: float = 0.0
  choices: int = 0
  choices_right: int = 0
  choices_unclear: int = 0
  texts: int = 0
  texts_right: int = 0
  captions: int = 0

  def results(self) -> dict[str, Any]:
    """Named metrics in 0..1 and counts; kinds without a question have none."""
    out = {}
    yes = self.yes_right + self.yes_wrong
    unclear = self.unclear_yes + self.unclear_no
    asked = yes + self.no_right + self.no_wrong + unclear
    if np.any(asked):
      out["yes_no_accuracy"] = share(self.yes_right + self.no_right, asked)
      missed = self.no_wrong + self.unclear_yes
      # Harmonic mean of precision and recall of "yes".
      out["yes_no_f1"] = (
        2
        * self.yes_right
        / np.maximum(2 * self.yes_right + self.yes_wrong + missed, 1e-10)
      )
      out["yes_share"] = share(yes, asked)
      out["yes_no_unclear"] = unclear
    if np.any(self.vqa):
      out["vqa_exact"] = share(self.vqa_exact, self.vqa)
      out["vqa_soft"] = share(self.vqa_soft, self.vqa)
    if np.any(self.choices):
      out["choice_accuracy"] = share(self.choices_right, self.choices)
      out["choice_unclear"] = self.choices_unclear
    if np.any(self.texts):
      out["text_exact"] = share(self.texts_right, self.texts)
    if np.any(self.captions):
      out["captions"] = self.captions
    out["questions"] = self.questions
    return {name: plain(value) for name, value in out.items()}


def score_answer(
  kind: str, text: str, answers: Sequence[str], *, question: str = ""
) -> tuple[UnderstandingSums, float]:
  """The sums of one answered question, and its own score in 0..1.

  Args:
    kind: of `KINDS`; others count as "text".
    text: what the model said.
    answers: the true one, or those of several people.
    question: holds the options of a multiple choice, one a line.

  Raises:
    ValueError: there is no true answer, or one that is none of the options.
  """
  if not answers:
    raise ValueError("a question has no true answer")
  one = UnderstandingSums(questions=1)
  if kind == "yes_no":
    true, said = _yes_or_no(answers[0]), _yes_or_no(text)
    if true is None:
      raise ValueError(f"true answer {answers[0]!r} is neither yes nor no")
    right = said == true
    outcome = "right" if right else "wrong"
    name = f"unclear_{true}" if said is None else f"{said}_{outcome}"
    return dataclasses.replace(one, **{name: 1}), float(right)
  if kind == "vqa":
    said, known = normalize(text), [normalize(a) for a in answers]
    equal = known.count(said)
    # With fewer than three people, one of them is enough.
    soft = min(equal / min(len(known), 3), 1.0)
    commonest = max(known, key=known.count)
    exact = int(said == commonest)
    return dataclasses.replace(one, vqa=1, vqa_exact=exact, vqa_soft=soft), soft
  if kind == "choice":
    options = dict(_OPTION.findall(question))
    true, said = chosen(answers[0], options), chosen(text, options)
    if true is None:
      raise ValueError(f"true answer {answers[0]!r} is none of the options")
    right = int(said == true)
    return dataclasses.replace(
      one, choices=1, choices_right=right, choices_unclear=int(said is None)
    ), float(right)
  if kind == "caption":
    return dataclasses.replace(one, captions=1), 0.0
  right = int(normalize(text) in map(normalize, answers))
  return dataclasses.replace(one, texts=1, texts_right=right), float(right)


def normalize(text: str) -> str:
  """A short answer as VQA compares it: small letters, numbers as digits, no
  articles, no punctuation but points and commas inside numbers."""
  text = text.lower().strip().replace("'", "").replace("’", "")
  text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)", " ", text)
  text = re.sub(r"(?<=\d),(?=\d)", "", text)
  text = re.sub(r"[^\w\s.:%$]", " ", text)
  words = (_NUMBERS.get(word, word) for word in text.split())
  return " ".join(word for word in words if word not in _ARTICLES)


def chosen(text: str, options: dict[str, str]) -> str | None:
  """The letter of the option that an answer names; None if unclear.

  Args:
    text: the answer.
    options: letter -> text; without any, all letters are options.
  """
  for pattern in _LETTERS:
    found = {letter.upper() for letter in pattern.findall(text)}
    if options:
      found &= options.keys()
    if len(found) == 1:
      return found.pop()
  said = f" {normalize(text)} "
  named = [
    letter
    for letter, option in options.items()
    if normalize(option) and f" {normalize(option)} " in said
  ]
  return named[0] if len(named) == 1 else None


def _yes_or_no(text: str) -> str | None:
  """The first of the two words in an answer."""
  found = _YES_NO.search(text)
  return found.group(1).lower() if found else None
