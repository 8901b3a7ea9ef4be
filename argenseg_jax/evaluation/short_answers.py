"""Answers in words, read strictly: nothing that means something is lost.

`published_rules` reads them as the benchmarks' own scripts do.
"""

import re
import unicodedata
from collections.abc import Mapping

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3"} | {
  **{"four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"},
  **{"nine": "9", "ten": "10"},
}
ARTICLES = ("a", "an", "the")

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
# "A. a cat", "(B) a dog", "C: a cow", one a line of the question.
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)

_QUOTES = "\"'`“”„‘’‚«»"
_MINUS = "-−‐‑‒–"
# Punctuation that means something wherever it stands; other symbols do too.
_KEPT = "#%@&§‰′″"
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")

# A letter with nothing but punctuation around it.
_ALONE = re.compile(r"[\s\"'“”*(\[]*([A-Z])[\s\"'“”*)\].:,;!]*")
_LED = re.compile(r"\s*[*(\[]*([A-Z])[*)\].:]+\s*(.*)", re.DOTALL)
_ANSWER = re.compile(r"\banswer(?:\s+is)?\s*[:\s]\s*(.*)", re.I | re.DOTALL)
# From the surest to the least sure way to name a letter within a sentence.
_LETTERS = (
  re.compile(r"\b(?:option|choice|answer)\s+([A-Z])\b(?!['’°\w])"),
  re.compile(r"\(([A-Z])\)"),
  # "A" and "I" are words, too; "°C", "C#" and "C's" are no letters alone.
  re.compile(r"(?<![\w°#'’.-])([B-HJ-Z])(?![\w°#+'’-])"),
)


def normalize(text: str) -> str:
  """A short answer as it is compared: small letters, numbers as digits, without
  articles and without punctuation that only separates.

  Signs, decimal points, marks of letters and symbols ("-5", "3.5", "C#", "°C")
  stay; nothing is taken from an answer that would be empty without it. Equal
  texts of Unicode are equal, however they are composed.
  """
  text = unicodedata.normalize("NFC", text)
  text = unicodedata.normalize("NFC", text.casefold()).strip()
  if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
    text = text[1:-1]
  text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
  words = "".join(_part(text, i) for i in range(len(text))).split()
  words = [NUMBERS.get(word, word) for word in words]
  kept = [
    word
    for word, after in zip(words, [*words, ""][1:], strict=True)
    # At the end ("vitamin a") and before a number it is no article.
    if word not in ARTICLES or not after[:1].isalpha()
  ]
  return " ".join(kept) or text


def _part(text: str, i: int) -> str:
  """What a character of a text becomes; symbols stand alone."""
  this = text[i]
  before, after = text[i - 1 : i], text[i + 1 : i + 2]
  kind = unicodedata.category(this)
  if kind[0] in "LNM":
    return this
  if kind == "Cf":  # Joiners do not change what is said.
    return ""
  between_digits = before.isdigit() and after.isdigit()
  if this in _MINUS:
    spaced = before == after == " "
    if between_digits or (
      spaced and text[i - 2 : i - 1].isdigit() and text[i + 2 : i + 3].isdigit()
    ):
      return " - "
    is_sign = after.isdigit() or (
      after == "." and text[i + 2 : i + 3].isdigit()
    )
    return " -" if is_sign and not before.isalnum() else " "
  if this == "." and after.isdigit():
    if before.isdigit():
      return this
    return " " if before.isalnum() else "0."
  if this in ":/*":
    return this if between_digits else " "
  if this in _QUOTES:
    return f" {this} " if before.isdigit() else ""
  if this in _KEPT or (kind[0] == "S" and this != "`"):
    return f" {this} "
  return " "


def yes_or_no(text: str) -> str | None:
  """The first of the two words in an answer."""
  found = _YES_NO.search(unicodedata.normalize("NFC", text))
  return found.group(1).lower() if found else None


def options_of(question: str) -> dict[str, str]:
  """Letter -> text of the options of a multiple choice, one a line."""
  return dict(_OPTION.findall(question))


def true_option(answer: str, options: Mapping[str, str]) -> str | None:
  """The letter of a true answer, which is a letter or the text of one option.

  Args:
    answer: of the data.
    options: letter -> text; without any, all letters are options.
  """
  found = re.fullmatch(r"\s*[(\[]?([A-Za-z])[)\].:]?\s*", answer)
  if found and (not options or found[1].upper() in options):
    return found[1].upper()
  return _of_text(answer, options)


def chosen(text: str, options: Mapping[str, str]) -> str | None:
  """The letter of the option that an answer names; None if unclear.

  A letter alone, or else an option's text, or a letter that leads it ("B. a
  dog"), after "answer is" or not; then one option's text within a sentence,
  "option X", "(X)", or a letter that is no word and not part of any option.

  Args:
    text: the answer.
    options: letter -> text; without any, all letters are options.
  """
  text = unicodedata.normalize("NFC", text).strip()
  answer = _ANSWER.search(text)
  for said in (text, answer[1] if answer else ""):
    named = _named(said, options)
    if named:
      return named.pop() if len(named) == 1 else None
  named = _within(text, options)
  if named:
    return named.pop() if len(named) == 1 else None
  for pattern in _LETTERS:
    found = set(pattern.findall(text))
    if options:
      found &= options.keys()
    if len(found) == 1:
      return found.pop()
  return None


def _named(said: str, options: Mapping[str, str]) -> set[str]:
  """The option that is all of an answer; two where it contradicts itself."""
  alone = _ALONE.fullmatch(said)
  if alone and (not options or alone[1] in options):
    return {alone[1]}
  if (letter := _of_text(said, options)) is not None:
    return {letter}
  led = _LED.fullmatch(said)
  if led is None or (options and led[1] not in options):
    return set()
  return {led[1]} | _within(led[2], options)  # "B. a cat", where that is A.


def _of_text(said: str, options: Mapping[str, str]) -> str | None:
  equal = [k for k, v in options.items() if normalize(v) == normalize(said)]
  return equal[0] if len(equal) == 1 else None


def _within(said: str, options: Mapping[str, str]) -> set[str]:
  """Options whose text stands in an answer, not within a longer option's."""
  text = f" {normalize(said)} "
  spans = {}
  for letter, option in options.items():
    words = f" {normalize(option)} "
    if words.strip() and (start := text.find(words)) >= 0:
      spans[letter] = (start, start + len(words))
  return {
    letter
    for letter, (start, stop) in spans.items()
    if not any(
      a <= start and stop <= b and b - a > stop - start
      for a, b in spans.values()
    )
  }
