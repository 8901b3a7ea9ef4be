"""Answers in words, scored: yes or no, VQA, multiple choice, exact text.

Each kind has a strict number of ours (`short_answers`) and, where a benchmark
published a rule, the number of that rule (`published_rules`).
docs/evaluation.md has the definitions. Nothing here reads a model or images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from argenseg_jax.evaluation import published_rules, short_answers
from argenseg_jax.evaluation.segmentation_metrics import (
  MetricSums,
  plain,
  share,
)

KINDS = ("yes_no", "vqa", "choice", "caption", "text")


@dataclasses.dataclass
class UnderstandingSums(MetricSums):
  """Sums over questions that are answered in words.

  Attributes:
    questions: that were asked.
    yes_right, yes_wrong: answers "yes", by whether that is true.
    no_right, no_wrong: answers "no".
    unclear_yes, unclear_no: true "yes" and "no" answered with neither.
    pope_yes_right, pope_yes_wrong, pope_no_right, pope_no_wrong: the same as
      POPE reads answers.
    vqa: questions with several people's answers.
    vqa_exact: whose answer equals the commonest of them.
    vqa_soft: sum of min(equal answers / 3, 1).
    vqa_published: sum of VQA's accuracies.
    choices, choices_right, choices_unclear: of multiple choice; unclear answers
      name no option.
    choices_mmmu, choices_scienceqa: right answers as these read them.
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
  pope_yes_right: int = 0
  pope_yes_wrong: int = 0
  pope_no_right: int = 0
  pope_no_wrong: int = 0
  vqa: int = 0
  vqa_exact: int = 0
  vqa_soft: float = 0.0
  vqa_published: float = 0.0
  choices: int = 0
  choices_right: int = 0
  choices_unclear: int = 0
  choices_mmmu: float = 0.0
  choices_scienceqa: int = 0
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
      out["yes_no_f1"] = _f1(self.yes_right, self.yes_wrong, missed)
      out["yes_share"] = share(yes, asked)
      out["yes_no_unclear"] = unclear
      right = self.pope_yes_right + self.pope_no_right
      out["pope_accuracy"] = share(right, asked)
      out["pope_f1"] = _f1(
        self.pope_yes_right, self.pope_yes_wrong, self.pope_no_wrong
      )
      said_yes = self.pope_yes_right + self.pope_yes_wrong
      out["pope_yes_share"] = share(said_yes, asked)
    if np.any(self.vqa):
      out["vqa_exact"] = share(self.vqa_exact, self.vqa)
      out["vqa_soft"] = share(self.vqa_soft, self.vqa)
      out["vqa_accuracy"] = share(self.vqa_published, self.vqa)
    if np.any(self.choices):
      out["choice_accuracy"] = share(self.choices_right, self.choices)
      out["choice_unclear"] = self.choices_unclear
      out["mmmu_accuracy"] = share(self.choices_mmmu, self.choices)
      out["scienceqa_accuracy"] = share(self.choices_scienceqa, self.choices)
    if np.any(self.texts):
      out["text_exact"] = share(self.texts_right, self.texts)
    if np.any(self.captions):
      out["captions"] = self.captions
    out["questions"] = self.questions
    return {name: plain(value) for name, value in out.items()}


def _f1(right: Any, wrong: Any, missed: Any) -> Any:
  """Harmonic mean of precision and recall."""
  return 2 * right / np.maximum(2 * right + wrong + missed, 1e-10)


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
    ValueError: there is no true answer, or one that no rule can read.
  """
  if not answers:
    raise ValueError("a question has no true answer")
  one = UnderstandingSums(questions=1)
  if kind == "yes_no":
    return _score_yes_no(one, text, answers[0])
  if kind == "vqa":
    return _score_vqa(one, text, answers)
  if kind == "choice":
    return _score_choice(one, text, answers[0], question)
  if kind == "caption":
    return dataclasses.replace(one, captions=1), 0.0
  known = [short_answers.normalize(answer) for answer in answers]
  if not all(known):
    raise ValueError("a true answer is empty")
  right = int(short_answers.normalize(text) in known)
  return dataclasses.replace(one, texts=1, texts_right=right), float(right)


def _score_yes_no(
  one: UnderstandingSums, text: str, answer: str
) -> tuple[UnderstandingSums, float]:
  true, said = map(short_answers.yes_or_no, (answer, text))
  if true is None:
    raise ValueError(f"true answer {answer!r} is neither yes nor no")
  right = said == true
  outcome = {True: "right", False: "wrong"}
  name = f"unclear_{true}" if said is None else f"{said}_{outcome[right]}"
  pope = published_rules.pope(text)
  counted = {name: 1, f"pope_{pope}_{outcome[pope == true]}": 1}
  return dataclasses.replace(one, **counted), float(right)


def _score_vqa(
  one: UnderstandingSums, text: str, answers: Sequence[str]
) -> tuple[UnderstandingSums, float]:
  said, known = (
    short_answers.normalize(text),
    [short_answers.normalize(answer) for answer in answers],
  )
  if not all(known):
    raise ValueError("a true answer is empty")
  equal = known.count(said)
  # With fewer than three people, one of them is enough.
  soft = min(equal / min(len(known), 3), 1.0)
  commonest = max(known, key=known.count)
  counted = dataclasses.replace(
    one,
    vqa=1,
    vqa_exact=int(said == commonest),
    vqa_soft=soft,
    vqa_published=published_rules.vqa(text, answers),
  )
  return counted, soft


def _score_choice(
  one: UnderstandingSums, text: str, answer: str, question: str
) -> tuple[UnderstandingSums, float]:
  options = short_answers.options_of(question)
  true = short_answers.true_option(answer, options)
  if true is None:
    raise ValueError(f"true answer {answer!r} is none of the options")
  said = short_answers.chosen(text, options)
  right = int(said == true)
  guesses = published_rules.mmmu(text, options)
  counted = dataclasses.replace(
    one,
    choices=1,
    choices_right=right,
    choices_unclear=int(said is None),
    choices_mmmu=guesses.count(true) / max(len(guesses), 1),
    choices_scienceqa=int(published_rules.science_qa(text, options) == true),
  )
  return counted, float(right)
