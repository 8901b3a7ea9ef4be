"""How the benchmarks' own scripts read answers in words.

Reimplemented from what they compute, for numbers that can be compared with
published ones: POPE, VQA (v2), MMMU, and ScienceQA as LLaVA reads it.
"""

import re
from collections.abc import Mapping, Sequence

from argenseg_jax.evaluation.short_answers import ARTICLES, NUMBERS

# What a results file says of each number.
RULES = {
  "pope_accuracy": "POPE: no, not or No in the first sentence is no, anything "
  "else is yes",
  "vqa_accuracy": "VQA v2: mean over people left out of min(equal others / 3, "
  "1), in its normal form",
  "mmmu_accuracy": "MMMU: the last option named; where none is, the "
  "expectation of its random guess",
  "scienceqa_accuracy": "ScienceQA (LLaVA): a letter, 'X. ...' or 'The answer "
  "is X.'; else wrong",
  "yes_no_accuracy": "ours: the first yes or no; neither is wrong",
  "vqa_soft": "ours: min(equal / 3, 1), strictly compared",
  "choice_accuracy": "ours: one option by letter or text; unclear is wrong",
  "text_exact": "ours: equal to a true answer, strictly compared",
}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_STEMS = {
  "t": "ain aren couldn didn doesn don hadn hasn haven isn mightn mustn needn "
  "shan shouldn wasn weren won wouldn",
  "s": "he how let she that there what when where who why",
  "d": "he how it she that there they what where who you",
  "ll": "how it she somebody that there they what where who why you",
  "re": "how there they we what who why you",
  "ve": "could i might must should there they we who would you",
}
_CONTRACTIONS = {
  f"{stem}{tail}": f"{stem}'{tail}"
  for tail, stems in _STEMS.items()
  for stem in stems.split()
}
_SCIENCE_QA = re.compile(r"The answer is ([A-Z])\.")


def pope(text: str) -> str:
  """ "yes" or "no"."""
  words = text.split(".")[0].replace(",", "").split(" ")
  return "no" if {"No", "not", "no"} & set(words) else "yes"


def vqa(text: str, answers: Sequence[str]) -> float:
  """The accuracy of an answer among those of (usually ten) people."""
  said, known = _one_line(text), [_one_line(a) for a in answers]
  if len(set(known)) > 1:
    said, known = _vqa_form(said), [_vqa_form(a) for a in known]
  equal = known.count(said)
  if len(known) == 1:
    return float(equal)
  # Of each person's answer: how many others gave the one that was said.
  others = [equal - (answer == said) for answer in known]
  return sum(min(n / 3, 1.0) for n in others) / len(known)


def _one_line(text: str) -> str:
  return text.replace("\n", " ").replace("\t", " ").strip()


def _vqa_form(text: str) -> str:
  made = text
  for mark in _PUNCTUATION:
    free = f"{mark} " in text or f" {mark}" in text or _COMMA.search(text)
    made = made.replace(mark, "" if free else " ")
  made = _PERIOD.sub("", made)
  words = [NUMBERS.get(word, word) for word in made.lower().split()]
  words = [word for word in words if word not in ARTICLES]
  return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def mmmu(text: str, options: Mapping[str, str]) -> list[str]:
  """Letters of the options that an answer may mean; all where it guesses."""
  said = text
  for mark in ",.!?;:'":
    said = said.strip(mark)
  said = f" {said} "
  for form in ("({})", " {} "):
    places = {k: said.rfind(form.format(k)) for k in options}
    places = {k: place for k, place in places.items() if place >= 0}
    if places:
      return [max(places, key=places.__getitem__)]
  if len(said.split()) > 5:
    lower = said.lower()
    places = {k: lower.rfind(v.lower()) for k, v in options.items()}
    places = {k: place for k, place in places.items() if place >= 0}
    if places:
      return [max(places, key=places.__getitem__)]
  return list(options)


def science_qa(text: str, options: Mapping[str, str]) -> str | None:
  """The letter of an answer; None where it fails."""
  if text in options:
    return text
  if text[:1] in options and text[1:3] == ". ":
    return text[0]
  found = _SCIENCE_QA.findall(text)
  return found[0] if len(found) == 1 else None
