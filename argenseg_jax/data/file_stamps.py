"""What the files of records held: told apart when they change on disk.

A record's stamp is two numbers: of the sizes and times of its files, quick to
look up, and of their content. Files that were merely copied keep the second.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import UInt64

from argenseg_jax.data import input_files, masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.array_record import ArrayRecordSource
from argenseg_jax.data.sources.sample import Sample, Source
from argenseg_jax.runtime import paths

SPOT = 1000  # Records that a run looks at when it resumes.
_PIECE = 1 << 16  # Bytes read at the beginning, middle and end of a file.


class Stamps(NamedTuple):
  """Of the records of a source, one a record; of its shards, one a shard."""

  quick: UInt64[np.ndarray, "records"]
  content: UInt64[np.ndarray, "records"]


def stamps(source: Source, *, most: int | None = None) -> Stamps:
  """Of all records, or of at most `most` that are spread over them; one that
  cannot be read has a stamp of its own, too."""
  found = [
    (_number(_quick(part)), _number(_content(part)))
    for _, part in _chosen(source, most)
  ]
  quick, content = np.array(found, np.uint64).reshape(-1, 2).T
  return Stamps(quick, content)


def digest(source: Source) -> str:
  """Of what `SPOT` records spread over `source` contain, in 16 digits."""
  content = stamps(source, most=SPOT).content
  return hashlib.sha256(content.tobytes()).hexdigest()[:16]


def first_changed(
  source: Source, known: Stamps, *, most: int | None = None
) -> str:
  """Names the first record whose images or masks are others than before; ""
  where none is. With the `most` that `stamps` was given."""
  total = len(_parts(source))
  count = total if most is None else min(most, total)
  if count != len(known.quick):
    return f"{count} records in place of {len(known.quick)}"
  parts = _chosen(source, most)
  for (index, part), quick, content in zip(parts, *known, strict=True):
    if _number(_quick(part)) != quick and _number(_content(part)) != content:
      return f"record {index} ({_named(part)})"
  return ""


def _chosen(source: Source, most: int | None) -> Iterator[tuple[int, Any]]:
  """Records or shards, with their numbers."""
  parts = _parts(source)
  count = len(parts) if most is None else min(most, len(parts))
  for number in range(count):
    index = number * len(parts) // count
    yield index, parts[index]


class _Lazy:
  """Records of a source, each read when it is asked for."""

  def __init__(self, source: Source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Sample | str:
    if index >= len(self):
      raise IndexError(index)
    try:
      return self._source[index]
    except DataError as error:
      return str(error)


def _parts(source: Source) -> Any:
  """Records, or the shards that hold them."""
  if isinstance(source, ArrayRecordSource):
    return source.files
  return _Lazy(source)


def _named(part: Any) -> str:
  return part.where if isinstance(part, Sample) else str(part)


def _stored(part: Any) -> list[Any]:
  """Everything that a record or shard reads from."""
  if not isinstance(part, Sample):
    return [part]
  return [*part.images, *_flat([*part.seg_masks, *part.ignores])]


def _flat(stored: list[Any]) -> list[Any]:
  found = []
  for value in stored:
    if isinstance(value, masks.Union):
      found += _flat(list(value.parts))
    elif isinstance(value, masks.Segment):
      found += [value.stored, repr((value.values, value.color))]
    else:
      found.append(value)
  return found


def _quick(part: Any) -> list[bytes]:
  return [_quick_one(value) for value in _stored(part)]


def _quick_one(value: Any) -> bytes:
  if not _is_file(value):
    return _inside(value)
  try:
    found = os.stat(value)
  except OSError:
    return b"missing"
  return b"%d %d" % (found.st_size, found.st_mtime_ns)


def _content(part: Any) -> list[bytes]:
  return [_content_one(value) for value in _stored(part)]


def _content_one(value: Any) -> bytes:
  """Small files whole, of large ones three pieces and the size."""
  if not _is_file(value):
    return _inside(value)
  try:
    with open(input_files.open_regular(value), "rb") as file:
      size = os.fstat(file.fileno()).st_size
      pieces = [b"%d" % size]
      for start in sorted({0, max(size // 2, 0), max(size - _PIECE, 0)}):
        file.seek(start)
        pieces.append(file.read(_PIECE))
  except (DataError, OSError):
    return b"missing"
  return b"".join(pieces)


def _is_file(value: Any) -> TypeGuard[pathlib.Path]:
  return isinstance(value, paths.Path) and paths.is_local(value)


def _inside(value: Any) -> bytes:
  """What a record itself holds; of a file in a bucket, its size."""
  if isinstance(value, paths.Path):
    try:
      return b"%d %s" % (paths.size(value), os.fspath(value).encode())
    except OSError:
      return b"missing"
  if isinstance(value, bytes):
    return value
  if isinstance(value, np.ndarray):
    return repr(value.shape).encode() + np.ascontiguousarray(value).tobytes()
  if isinstance(value, (dict, list)):
    return json.dumps(value, default=repr).encode()
  return repr(value).encode()


def _number(parts: list[bytes]) -> int:
  digest = hashlib.blake2b(digest_size=8)
  for part in parts:
    digest.update(b"%d " % len(part))
    digest.update(part)
  return int.from_bytes(digest.digest(), "little")
