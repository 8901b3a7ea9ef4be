"""Reading what others wrote: files, JSON, names, numbers, text."""

import difflib
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from argenseg_jax.data import input_files
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.masks import whole_number
from argenseg_jax.runtime import paths

BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"  # Some editors put it before a text.
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MAX_ID = 100  # Characters of an id that is text.
# As `str.splitlines` it would end lines in the middle of a text, too.
_LINE_END = re.compile(r"\r\n|\r|\n")


def read_file(path: paths.Path, advice: str) -> bytes:
  """A file's bytes; DataError with advice when it cannot be read."""
  try:
    return input_files.read_bytes(path)
  except DataError as error:
    raise DataError(f"{str(error).rstrip('.')}; {advice}.") from error


def as_utf8(raw: bytes, where: str) -> str:
  """Text without a byte-order mark; DataError names what is not UTF-8."""
  try:
    return raw.decode("utf-8").removeprefix(BOM)
  except UnicodeDecodeError as error:
    if raw.startswith(_UTF16):
      reason = "is UTF-16, not UTF-8 text"
    else:
      reason = (
        f"is not UTF-8 text (byte {error.start} is {raw[error.start]:#04x})"
      )
    raise DataError(
      f"{where} {reason}; convert it, for example with iconv -t UTF-8."
    ) from error


def text_lines(raw: bytes, where: str) -> list[str]:
  """Lines of a text file, each without space around it; blank ones are left
  out. Only \\n, \\r\\n and \\r end a line."""
  found = map(clean, _LINE_END.split(as_utf8(raw, where)))
  return [line for line in found if line]


def clean(text: str) -> str:
  """A text without space and byte-order marks around it."""
  while text != (text := text.strip().strip(BOM)):
    pass
  return text


def parse_json(raw: bytes, where: str, kind: type, *, strict=False) -> Any:
  """JSON of the given type (dict or list).

  Args:
    raw: UTF-8, with or without a byte-order mark.
    where: for messages.
    kind: dict or list.
    strict: refuse NaN, infinity and repeated keys; for single records.

  Raises:
    DataError: what is wrong with it.
  """
  text = as_utf8(raw, where)
  hooks = {}
  if strict:
    hooks = {"parse_constant": _no_number, "object_pairs_hook": _no_repeats}
  try:
    value = json.loads(text, **hooks)
  except (ValueError, RecursionError) as error:  # Numbers, nesting too long.
    raise DataError(f"{where} is not JSON: {error}.") from error
  if not isinstance(value, kind):
    noun = "object" if kind is dict else "list"
    raise DataError(f"{where} is not a JSON {noun}.")
  return value


def _no_number(name: str) -> Any:
  raise ValueError(f"it contains {name}")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"it contains the key {twice!r} twice")
  return found


def below(root: paths.Path, name: Any, where: str) -> paths.Path:
  """The file of a relative name; DataError where it would leave `root`."""
  if not isinstance(name, str) or not clean(name):
    raise DataError(f"{where} names a file by {_short(name)}; use a path.")
  relative = pathlib.PurePosixPath(name)
  if ".." in relative.parts or relative.is_absolute():
    raise DataError(f"{where} names {name!r}, which is not below {root}.")
  return root / relative


def required_text(value: Any, where: str, what: str) -> str:
  """A text that says something, without space around it."""
  if not isinstance(value, str):
    raise DataError(f"{where} has {what} {_short(value)}, which is no text.")
  text = clean(value)
  if not text:
    raise DataError(f"{where} has an empty {what}.")
  return text


def as_text(value: Any) -> str:
  """Text from what TFDS gives for it."""
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def as_id(value: Any) -> int | str:
  """An id as it is compared: 7, 7.0 and "7" are the same one.

  Raises:
    ValueError, TypeError: it is no number and no short text.
  """
  if isinstance(value, str) and not value.isascii():
    return value[: _MAX_ID + 1]
  try:
    number = whole_number(value)
  except ValueError:
    if isinstance(value, str) and 0 < len(value) <= _MAX_ID:
      return value
    raise
  if abs(number) >= 1 << 63:
    raise ValueError("an id is too large")
  return number


def as_size(value: Mapping[str, Any]) -> tuple[int, int]:
  """Height and width of an image, as annotations give them.

  Raises:
    KeyError, TypeError, ValueError, OverflowError: they do not.
  """
  height, width = whole_number(value["height"]), whole_number(value["width"])
  if height < 1 or width < 1:
    raise ValueError(f"a size of {width}x{height}")
  return height, width


def is_finite(value: Any) -> bool:
  """Whether it is a number, neither true nor false, NaN nor infinite."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and -math.inf < value < math.inf


def nearest(key: str, known: Iterable[str], cutoff: float = 0.75) -> str:
  """The known key that a misspelt one means; "" where none is near."""
  plain = re.sub(r"[\W_]", "", key.lower())
  close = difflib.get_close_matches(plain, sorted(known), 1, cutoff)
  return close[0] if close else ""


def digest(*parts: bytes | str) -> str:
  """A fingerprint of the parts."""
  encoded = (p.encode() if isinstance(p, str) else p for p in parts)
  return hashlib.sha256(b"\0".join(encoded)).hexdigest()[:16]


def _short(value: Any) -> str:
  """A value for a sentence; what a pickle holds may be endless in full."""
  if isinstance(value, (dict, list, tuple, set)) and value:
    return f"a {type(value).__name__}"
  said = repr(value)
  return said if len(said) <= 60 else f"{said[:57]}..."
