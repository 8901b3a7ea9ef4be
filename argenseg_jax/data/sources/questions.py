"""What a record of `jsonl` may be called, and questions as conversations."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from argenseg_jax.data.chat import as_text, request_text
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import parsing
from argenseg_jax.data.sources.parsing import required_text

KEYS = (
  *("image", "mask", "conversations", "dataset", "kind", "answers", "answer"),
  *("label", "question", "text", "choices", "caption", "id", "ignore"),
  *("width", "height"),
)
# Others that data sets have, and that mean nothing here.
_HARMLESS = re.compile(
  r"(image|img|mask)_?(id|size|width|height|shape|source|url|license)s?|"
  r"(num|n)_(images|masks)|question_?(id|type)|answer_?(id|type)|category|"
  r"weight|source|split|hint|lecture|solution|grade|subject|topic|task"
)
# Parts of names that stand for the keys whose absence goes unnoticed.
_LOOK_LIKE = {
  "image": re.compile(r"ima?ge?s?\d*|pics?|pictures?|photos?|files?(names?)?"),
  "mask": re.compile(r"masks?\d*|seg(m|mentations?)?s?"),
  "choices": re.compile(r"(options?|candidates?|alternatives?)\d*"),
  "ignore": re.compile(r"ignored?|void|crowd"),
}
# "Yes.", "no ", "YES!": one word, whatever stands around it.
_YES_NO = re.compile(r"\W*(yes|no)\W*", re.IGNORECASE)


def require_known_keys(record: Mapping[str, Any], where: str) -> None:
  """Refuses an unknown key that is near to a known one which is missing: a
  record without its image would train and score all the same."""
  for key in record:
    if key in KEYS or _HARMLESS.fullmatch(key.lower()):
      continue
    near = _meant(key, record[key])
    if near and near not in record:
      raise DataError(
        f"{where} has the unknown key {key[:60]!r}; did you mean {near!r}?"
      )


def _meant(key: str, value: Any) -> str:
  if near := parsing.nearest(key, set(KEYS) - {"id"}, 0.8):
    return near
  if not isinstance(value, (str, list, dict)):
    return ""
  words = re.findall(r"[a-z]+\d*", re.sub(r"([A-Z]+)", r" \1", key).lower())
  for known, looks in _LOOK_LIKE.items():
    if any(looks.fullmatch(word) for word in words):
      return known
  return ""


def as_chat(record: dict[str, Any], where: str) -> dict[str, Any]:
  """A question with its answers as a chat record.

  Its kind, where it names none, is that of its answers: "choice", "vqa" for
  several people's answers, "yes_no", or else "text". The answer of a multiple
  choice becomes the option's letter: it may be that, the option's text, or its
  index from 0 on. A yes or no may have space and punctuation around it.

  Raises:
    DataError: no rule of the evaluation could read its answer.
  """
  key = "question" if "question" in record else "text"
  question = required_text(record[key], where, key)
  choices = _choices(record.get("choices", []), where)
  answers = record.get("answers", [])
  answers = answers if isinstance(answers, list) else [answers]
  given = record.get("answer", record.get("label"))
  if "answer" not in record and given in (0, 1) and not choices:
    raise DataError(
      f'{where} has the label {given}, which could be a number or mean "no" or '
      '"yes"; write what is meant.'
    )
  if given is None and not answers:
    raise DataError(f'{where} asks a question without "answer" or "answers".')
  answers = [_read(a, choices, where) for a in answers]
  if given is None:
    answer = max(answers, key=answers.count)
  else:
    answer = _read(given, choices, where)
  kind = record.get("kind", _kind(answer, answers, choices))
  if kind == "yes_no":
    answers = [_yes_or_no(a, where) for a in answers or [answer]]
  for option, letter in zip(choices, string.ascii_uppercase, strict=False):
    question += f"\n{letter}. {option}"
  template = kind if kind in ("choice", "caption") else "question"
  asked = request_text(template, [question])
  if not record.get("image"):
    asked = asked.replace("<image>\n", "", 1)
  turns = [
    {"from": "human", "value": asked},
    {"from": "gpt", "value": as_text(answer)},
  ]
  return record | {"kind": kind, "answers": answers, "conversations": turns}


def _kind(answer: str, answers: Sequence[str], choices: Sequence[str]) -> str:
  if choices:
    return "choice"
  if len(answers) > 1:
    return "vqa"
  return "yes_no" if _YES_NO.fullmatch(answer) else "text"


def _yes_or_no(answer: str, where: str) -> str:
  found = _YES_NO.fullmatch(answer)
  if found is None:
    raise DataError(
      f'{where} has the answer {answer[:60]!r}, not "yes" or "no".'
    )
  return found[1].lower()


def _choices(value: Any, where: str) -> list[str]:
  if not isinstance(value, list):
    raise DataError(f'{where} has "choices" that are no list of texts.')
  if value and not 2 <= len(value) <= len(string.ascii_uppercase):
    raise DataError(f"{where} has {len(value)} choices; use 2 to 26.")
  texts = [_number_or_text(v, where, "choice") for v in value]
  if twice := [t for t in texts if texts.count(t) > 1]:
    raise DataError(f"{where} has the choice {twice[0][:60]!r} twice.")
  return texts


def _read(answer: Any, choices: Sequence[str], where: str) -> str:
  """An answer as text; of a multiple choice, as a letter."""
  if isinstance(answer, dict) and isinstance(answer.get("answer"), str):
    answer = answer["answer"]  # As VQA's annotations hold each.
  if not choices:
    return _number_or_text(answer, where, "answer")
  letters = string.ascii_uppercase[: len(choices)]
  if isinstance(answer, int) and not isinstance(answer, bool):
    if 0 <= answer < len(choices):
      return letters[answer]
    raise DataError(
      f"{where} has the answer {answer}, the index of none of its "
      f"{len(choices)} choices (from 0 on)."
    )
  said = _number_or_text(answer, where, "answer")
  known = [c.casefold() for c in choices]
  found = {letters[i] for i, c in enumerate(known) if c == said.casefold()}
  bare = re.fullmatch(r"\(?([A-Za-z])[).:]?", said)
  if bare and bare[1].upper() in letters:
    found.add(bare[1].upper())
  if len(found) == 1:
    return found.pop()
  fault = "could be several" if found else "is none"
  raise DataError(
    f"{where} has the answer {said[:60]!r}, which {fault} of its choices."
  )


def _number_or_text(value: Any, where: str, what: str) -> str:
  if isinstance(value, (int, float)) and parsing.is_finite(value):
    return str(value)
  return required_text(value, where, what)


def answers_of(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
  """The true answers of several people, or none."""
  answers = record.get("answers", [])
  answers = answers if isinstance(answers, list) else [answers]
  return tuple(_read(answer, (), where) for answer in answers)
