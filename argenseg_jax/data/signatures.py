"""Hashes of the files of a built data set, and what has changed since.

A flipped bit of an image or record is read without a word by most readers.
"""

import hashlib
import json
import pathlib

from argenseg_jax.data.errors import DataError
from argenseg_jax.runtime import paths

NAME = "sha256.json"  # In the folder of a data set.


def sign(folder: pathlib.Path) -> None:
  """Notes the hash of every file below a folder."""
  digests = {
    name: _digest(folder / name) for name in sorted(paths.tree(folder))
  }
  digests.pop(NAME, None)
  paths.write_whole(folder / NAME, json.dumps(digests, indent=1))


def require_unchanged(folder: pathlib.Path) -> None:
  """Reads every file and compares; a folder without hashes (its build was
  killed just before, or is older) gets them.

  Raises:
    DataError: a file is missing or has changed.
  """
  signed = paths.read_json(folder / NAME)
  if signed is None:
    sign(folder)
    return
  for name, digest in signed.items():
    file = folder / name
    if not file.is_file() or _digest(file) != digest:
      raise DataError(
        f"{file} has changed since it was built, or is gone; remove {folder} "
        "and build it again."
      )


def _digest(file: pathlib.Path) -> str:
  with file.open("rb") as content:
    return hashlib.file_digest(content, "sha256").hexdigest()
