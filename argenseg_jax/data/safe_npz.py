"""Archives of arrays (`.npz`) that come from strangers."""

import io
import math
import zipfile
import zlib
from collections.abc import Callable
from typing import IO

import numpy as np

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
  raw = None if paths.is_local(path) else path.read_bytes()
  with zipfile.ZipFile(_opened(path, raw)) as archive:
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > most(paths.size(path)):
      raise ValueError(f"it unpacks to {unpacked} bytes")
    for member in archive.infolist():
      with archive.open(member) as array:
        shape, dtype = _header(array)
      if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"it holds fewer bytes than {shape} of {dtype} take")
  with np.load(_opened(path, raw), allow_pickle=False) as arrays:
    return dict(arrays)


def _opened(path: paths.Path, raw: bytes | None) -> paths.Path | IO[bytes]:
  return path if raw is None else io.BytesIO(raw)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
  read_header = _HEADERS[np.lib.format.read_magic(file)]
  try:
    shape, _, dtype = read_header(file)
  except ERRORS:
    raise
  except Exception as error:  # numpy lets errors of its tokenizer through.
    raise ValueError(f"an array has the header {error}") from error
  return shape, dtype
