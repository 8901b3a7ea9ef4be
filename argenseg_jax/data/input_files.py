"""Files that others wrote: regular ones only, of a size known beforehand."""

import os
import pathlib
import stat
from typing import NamedTuple

from argenseg_jax.data.errors import DataError
from argenseg_jax.runtime import paths

MAX_BYTES = 8 << 30  # Of one file that is read at once.
# Of a file that says it has none: those of /proc, some of which have no end.
_UNSIZED = 1 << 24


class Stamp(NamedTuple):
  """What changes when a file is written."""

  size: int
  modified_ns: int


def open_regular(path: paths.Path) -> int:
  """A file descriptor of a local file, to be closed by the caller.

  Raises:
    DataError: it cannot be opened, or is a pipe, a device, a folder, ...: to
      read one may never end.
  """
  try:
    # A pipe would otherwise block until somebody writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as error:
    raise DataError(
      f"cannot read {path}: {error.strerror or error}."
    ) from error
  except ValueError as error:  # A name that no file can have.
    raise DataError(f"cannot read {str(path)!r}: {error}.") from error
  if stat.S_ISREG(os.fstat(descriptor).st_mode):
    return descriptor
  os.close(descriptor)
  what = "a folder" if pathlib.Path(path).is_dir() else "not a regular file"
  raise DataError(f"cannot read {path}: it is {what}; give a file.")


def read_bytes(path: paths.Path, *, most: int = MAX_BYTES) -> bytes:
  """All bytes of a file on a disk or in a bucket.

  Raises:
    DataError: see `open_regular`; or more than `most` bytes.
  """
  if not paths.is_local(path):
    try:
      return path.read_bytes()
    except OSError as error:
      raise DataError(
        f"cannot read {path}: {error.strerror or error}."
      ) from error
  with open(open_regular(path), "rb") as file:
    size = os.fstat(file.fileno()).st_size
    if size > most:
      raise DataError(
        f"cannot read {path}: it has {size} bytes, more than {most}."
      )
    try:
      return file.read(size or _UNSIZED)
    except OSError as error:
      raise DataError(
        f"cannot read {path}: {error.strerror or error}."
      ) from error


def stamp_of(descriptor: int) -> Stamp:
  """Of an open file."""
  found = os.fstat(descriptor)
  return Stamp(found.st_size, found.st_mtime_ns)
