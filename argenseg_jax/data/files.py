"""Paths on a disk and in a bucket, read in the same way."""

import pathlib

from etils import epath

from argenseg_jax.data.errors import DataError

# What has `read_bytes`, `/`, `parent`, `glob`, `is_file` and the like.
Path = pathlib.Path | epath.Path


def as_path(name: str | Path) -> Path:
  """A local path, or one of a bucket for names such as "gs://bucket/file".

  Raises:
    DataError: nothing is installed that reads such a bucket, or it refuses.
  """
  if "://" not in str(name):
    return pathlib.Path(name)
  try:
    path = epath.Path(name)
    path.exists()
  except Exception as error:  # Each bucket's client has errors of its own.
    raise DataError(
      f"cannot reach {name}: {error} (gs:// needs the package gcsfs and "
      "credentials)."
    ) from error
  return path


def is_local(path: Path) -> bool:
  """Whether the file is on a disk of this machine."""
  return isinstance(path, pathlib.Path)


def size(path: Path) -> int:
  """Bytes of a file."""
  found = path.stat()
  return found.st_size if is_local(path) else found.length
