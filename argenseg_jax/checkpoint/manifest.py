"""A manifest of every file of a checkpoint, and what has changed since.

Orbax restores flipped bits without a word. `sign` writes size and hash of each
file before a step gets its final name (in a bucket: its `commit_success.txt`),
so that a complete step has its manifest; `faults` compares. The hash is sha256;
where a bucket keeps an md5 of each file, that is taken and nothing is read.
"""

import concurrent.futures
import contextlib
import contextvars
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping

from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path

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


def sign(step: Path, beside: Mapping[str, Path] | None = None) -> None:
  """Writes the manifest of a step directory; replaces it atomically.

  Args:
    step: the directory.
    beside: files outside it that it needs, by name.
  """
  found = _files(step)
  unread = [name for name, entry in found.items() if not entry.md5]
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    digests = pool.map(lambda name: _digest(step / name, "sha256"), unread)
    hashes = {
      name: {"sha256": digest}
      for name, digest in zip(unread, digests, strict=True)
    }
  entries = {
    name: {"bytes": entry.size} | hashes.get(name, {"md5": entry.md5})
    for name, entry in found.items()
  }
  others = {n: _digest(path, "sha256") for n, path in (beside or {}).items()}
  content = {"files": entries, "beside": others}
  paths.write_whole(step / MANIFEST, json.dumps(content, indent=1))


def faults_beside(step: Path, beside: Mapping[str, Path]) -> tuple[str, ...]:
  """Which files outside a step directory are no longer those that it was signed
  with. One that is not there is no fault: a step may be copied alone."""
  if _trusting.get():
    return ()
  try:
    signed = json.loads((step / MANIFEST).read_text()).get("beside", {})
    digests = {str(name): str(digest) for name, digest in signed.items()}
  except FileNotFoundError:
    return ()
  except (OSError, ValueError, AttributeError, RecursionError):
    return (f"{MANIFEST} is unreadable",)
  return tuple(
    f"{name} beside it has changed"
    for name, path in sorted(beside.items())
    if name in digests and not _is(path, "sha256", digests[name])
  )


def faults(step: Path, *, contents: bool = True) -> tuple[str, ...]:
  """What is wrong with a step directory, a few words a file; empty if nothing.

  Reads every byte (or asks a bucket for its hashes), once for each state of the
  files in one process; without `contents` it looks at names and sizes alone.
  """
  if _trusting.get():
    return ()
  try:
    if (step / _NOTES).exists():
      json.loads((step / _NOTES).read_text())
  except (OSError, ValueError, RecursionError):
    return (f"{_NOTES} is unreadable",)
  return _faults(step, tuple(_files(step).items()), contents)


@functools.lru_cache(maxsize=64)
def _faults(
  step: Path, state: tuple[tuple[str, paths.Entry], ...], contents: bool
) -> tuple[str, ...]:
  try:
    entries = json.loads((step / MANIFEST).read_text())["files"]
    wanted = {n: (e["bytes"], *_hash(e)) for n, e in entries.items()}
  except FileNotFoundError:
    return (f"{MANIFEST} is missing",)
  except (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    RecursionError,
  ):
    return (f"{MANIFEST} is unreadable",)
  there = dict(state)
  found = {n: f"{n} is missing" for n in wanted.keys() - there.keys()}
  found |= {
    n: f"{n} is not in {MANIFEST}" for n in there.keys() - wanted.keys()
  }
  whole = []
  for name in wanted.keys() & there.keys():
    size, kind, digest = wanted[name]
    if there[name].size != size:
      found[name] = f"{name} has {there[name].size} bytes, not {size}"
    elif contents and (kind != "md5" or there[name].md5 != digest):
      whole.append(name)
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    good = pool.map(lambda n: _is(step / n, *wanted[n][1:]), whole)
    for name, same in zip(whole, good, strict=True):
      if not same:
        found[name] = f"{name} has changed"
  return tuple(found[name] for name in sorted(found))


def _hash(entry: dict[str, str]) -> tuple[str, str]:
  """Kind and value."""
  kind = "md5" if "md5" in entry else "sha256"
  return kind, entry[kind]


def _files(step: Path) -> dict[str, paths.Entry]:
  found = paths.tree(step)
  return {name: found[name] for name in sorted(found) if name not in _UNSIGNED}


def _is(path: Path, kind: str, digest: str) -> bool:
  try:
    return _digest(path, kind) == digest
  except OSError:  # The disk gives no bytes back.
    return False


def _digest(path: Path, kind: str) -> str:
  with path.open("rb") as file:
    content = hashlib.new(kind)
    while block := file.read(1 << 20):
      content.update(block)
    return content.hexdigest()
