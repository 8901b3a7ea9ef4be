"""A manifest of every file of a checkpoint, and what has changed since.

Orbax restores flipped bits without a word. `sign` writes size and sha256 of
each file while a step is still under its temporary name, so that a step under
its final name has its manifest; `faults` compares.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

MANIFEST = "manifest.json"
# Orbax writes these as it gives a step its final name; they hold times.
_NOTES = "_CHECKPOINT_METADATA"
_UNSIGNED = (MANIFEST, f"{MANIFEST}.new", _NOTES, "commit_success.txt")
_READERS = 8  # Files hashed at a time; hashing frees the interpreter.
_trusting = contextvars.ContextVar("trusting", default=False)


@contextlib.contextmanager
def unverified() -> Iterator[None]:
  """Within it, `faults` looks at nothing and finds nothing."""
  token = _trusting.set(True)
  try:
    yield
  finally:
    _trusting.reset(token)


def sign(step: pathlib.Path) -> None:
  """Writes the manifest of a step directory; replaces it atomically."""
  names = _files(step)
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    digests = pool.map(lambda name: _digest(step / name), names)
    entries = {
      name: {"bytes": (step / name).stat().st_size, "sha256": digest}
      for name, digest in zip(names, digests, strict=True)
    }
  write_whole(step / MANIFEST, json.dumps({"files": entries}, indent=1))


def write_whole(path: pathlib.Path, text: str, *, durable: bool = True) -> None:
  """Writes a file that is there with all its text, or not at all.

  Args:
    path: of the file; `PATH.new` is used on the way.
    text: all of it.
    durable: wait until it is on disk.
  """
  new = path.with_name(f"{path.name}.new")
  with new.open("w") as file:
    file.write(text)
    if durable:
      file.flush()
      os.fsync(file.fileno())
  new.replace(path)


def faults(step: pathlib.Path, *, contents: bool = True) -> tuple[str, ...]:
  """What is wrong with a step directory, a few words a file; empty if nothing.

  Reads every byte, once for each state of the files in one process; without
  `contents` it looks at names and sizes alone.
  """
  if _trusting.get():
    return ()
  try:
    if (step / _NOTES).exists():
      json.loads((step / _NOTES).read_text())
  except (OSError, ValueError, RecursionError):
    return (f"{_NOTES} is unreadable",)
  files = [(name, (step / name).stat()) for name in _files(step)]
  state = tuple((n, s.st_size, s.st_mtime_ns) for n, s in files)
  return _faults(step, state, contents)


@functools.lru_cache(maxsize=64)
def _faults(
  step: pathlib.Path, state: tuple[tuple[str, int, int], ...], contents: bool
) -> tuple[str, ...]:
  try:
    entries = json.loads((step / MANIFEST).read_text())["files"]
    wanted = {n: (e["bytes"], e["sha256"]) for n, e in entries.items()}
  except FileNotFoundError:
    return (f"{MANIFEST} is missing",)
  except (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    RecursionError,
  ):
    return (f"{MANIFEST} is unreadable",)
  sizes = {name: size for name, size, _ in state}
  found = {n: f"{n} is missing" for n in wanted.keys() - sizes.keys()}
  found |= {
    n: f"{n} is not in {MANIFEST}" for n in sizes.keys() - wanted.keys()
  }
  whole = []
  for name in wanted.keys() & sizes.keys():
    if sizes[name] != wanted[name][0]:
      found[name] = f"{name} has {sizes[name]} bytes, not {wanted[name][0]}"
    elif contents:
      whole.append(name)
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    good = pool.map(lambda n: _is(step / n, wanted[n][1]), whole)
    for name, same in zip(whole, good, strict=True):
      if not same:
        found[name] = f"{name} has changed"
  return tuple(found[name] for name in sorted(found))


def _files(step: pathlib.Path) -> list[str]:
  return sorted(
    str(path.relative_to(step))
    for path in step.rglob("*")
    if path.is_file() and str(path.relative_to(step)) not in _UNSIGNED
  )


def _is(path: pathlib.Path, digest: str) -> bool:
  try:
    return _digest(path) == digest
  except OSError:  # The disk gives no bytes back.
    return False


def _digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
