"""Archives of arrays (`.npz`) that come from strangers."""

import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from typing import IO

import numpy as np

from argenseg_jax.data import input_files
from argenseg_jax.runtime import paths

# What a broken archive may raise.
ERRORS = (
  *(OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError),
  *(zipfile.BadZipFile, zlib.error, MemoryError),
)
_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path: paths.Path, most: Callable[[int], int]) -> dict[str, np.ndarray]:
  """The arrays of an archive, which must fit the bytes that they claim.

  Args:
    path: of the archive.
    most: from the archive's size in bytes, the bytes that it may unpack to.

  Raises:
    ERRORS: it is none, unpacks to more, or holds something else than arrays.
  """
  if not paths.is_local(path):
    return read_from(io.BytesIO(path.read_bytes()), most(paths.size(path)))
  with open(input_files.open_regular(path), "rb") as file:
    return read_from(file, most(os.fstat(file.fileno()).st_size))


def read_from(file: IO[bytes], most: int) -> dict[str, np.ndarray]:
  """As `read`, from an open file; `most` are the bytes it may unpack to."""
  with zipfile.ZipFile(file) as archive:
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > most:
      raise ValueError(f"it unpacks to {unpacked} bytes")
    for member in archive.infolist():
      with archive.open(member) as array:
        _require_fitting(array, member.file_size)
  file.seek(0)
  with np.load(file, allow_pickle=False) as arrays:
    return dict(arrays)


def read_array(data: bytes) -> np.ndarray:
  """The array of a `.npy`, which must fit the bytes that it claims.

  Raises:
    ERRORS: it is none.
  """
  _require_fitting(io.BytesIO(data), len(data))
  return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _require_fitting(file: IO[bytes], size: int) -> None:
  shape, dtype = _header(file)
  if math.prod(shape) * dtype.itemsize > size:
    raise ValueError(f"it contains fewer bytes than {shape} of {dtype} take")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
  read_header = _HEADERS[np.lib.format.read_magic(file)]
  try:
    shape, _, dtype = read_header(file)
  except ERRORS:
    raise
  except Exception as error:  # numpy lets errors of its tokenizer through.
    raise ValueError(f"an array has the header {error}") from error
  return shape, dtype
