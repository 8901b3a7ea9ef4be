"""Evaluations that were interrupted: what they were, and what they answered."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import paths

CLAIM = "eval.json"


@contextlib.contextmanager
def claimed(
  out: pathlib.Path, report: dict[str, Any], name: str
) -> Iterator[None]:
  """Notes in a folder what is evaluated there, and holds it meanwhile.

  Args:
    out: the folder, which may not exist.
    report: settings, and a fingerprint of each data set.
    name: of the folder, for messages.

  Raises:
    ConfigError: another evaluation, or one of other data, was begun there, or
      another process holds the folder.
  """
  path = out / CLAIM
  _require_same(path, report, name)
  out.mkdir(parents=True, exist_ok=True)
  if not path.exists():
    paths.write_whole(path, json.dumps(report, indent=1))
  with path.open() as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(
        f"another evaluation writes to {name}; wait for it or give another "
        "--out."
      ) from error
    yield


def _require_same(
  path: pathlib.Path, report: dict[str, Any], name: str
) -> None:
  wanted = json.loads(json.dumps(report))
  if path.exists():
    try:
      found = json.loads(path.read_text())
      differing = [k for k in wanted if found.get(k) != wanted[k]]
    except (ValueError, AttributeError) as error:
      raise ConfigError(f"{path} is damaged; give another --out.") from error
    if differing == ["fingerprints"]:
      raise ConfigError(
        f"{name} contains an unfinished evaluation of data that has changed "
        f"since ({_changed(found, wanted)}); give another --out."
      )
    if differing:
      raise ConfigError(
        f"{name} contains another evaluation, not finished: its {path.name} "
        f"differs in {', '.join(map(repr, differing))}; give another --out or "
        "the same arguments."
      )


def _changed(found: dict[str, Any], wanted: dict[str, Any]) -> str:
  before = found.get("fingerprints") or {}
  now = wanted["fingerprints"]
  return ", ".join(name for name in now if before.get(name) != now[name])


def keep_whole_batches(path: pathlib.Path, size: int) -> list[dict[str, Any]]:
  """The records of an interrupted evaluation, up to its last batch but one.

  The file is cut to them (a copy takes its place at once), so that a resumed
  evaluation appends to it. The last batch may be incomplete and is answered
  again: in another company, padding may be longer and an answer differ. So is
  everything after a damaged line.

  Args:
    path: may be absent.
    size: of a batch.
  """
  found = list(_intact(path.read_bytes())) if path.exists() else []
  end = found[-1]["sample"] // size * size if found else 0
  kept = [values for values in found if values["sample"] < end]
  text = "".join(json.dumps(values) + "\n" for values in kept)
  paths.write_whole(path, text)
  return kept


def _intact(data: bytes) -> Iterator[dict[str, Any]]:
  """Records up to the first line that is damaged or out of order."""
  seen: set[tuple] = set()
  last = 0
  for line in data.split(b"\n"):
    try:
      values = json.loads(line.decode("utf-8"))
      sample, number = values["sample"], values.get("number", 0)
      whole = type(sample) is int and sample >= last
      whole = whole and (sample, number) not in seen
      whole = whole and ("mask" in values or "answers" in values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      return
    if not whole:
      return
    seen.add((sample, number))
    last = sample
    yield values
