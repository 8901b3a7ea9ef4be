"""Records that TFDS has prepared, and the files that they are in."""

import bisect
import collections
import contextlib
import functools
import itertools
import resource
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.parsing import parse_json, read_file
from argenseg_jax.runtime import paths

_KEPT_FREE = 256  # Files that a process may open beside its shards.


class TfdsRecords:
  """The records of a split that TFDS has prepared, read on first use.

  Args:
    path: the folder that holds dataset_info.json.
    split: its name.
    encoded: features that are left as encoded bytes.
  """

  def __init__(
    self, path: paths.Path, split: str, encoded: tuple[str, ...] = ()
  ):
    if not paths.is_local(path):
      raise DataError(
        f"ArrayRecord files as in {path} are read from a disk; mount "
        "the bucket (gcsfuse) or copy them."
      )
    self._path = path
    self._split = split
    self._encoded = encoded
    raw = read_file(
      path / "dataset_info.json", "give the folder of a prepared data set"
    )
    info = parse_json(raw, str(path / "dataset_info.json"), dict)
    try:
      self._counts = {
        str(s["name"]): tuple(map(int, s["shardLengths"]))
        for s in info["splits"]
      }
    except (KeyError, TypeError, ValueError) as error:
      raise DataError(
        f"{path / 'dataset_info.json'} has no splits as TFDS writes them."
      ) from error
    if split not in self._counts:
      raise DataError(
        f"{path} has no split {split!r}; it has {', '.join(self._counts)}."
      )
    self.info = raw

  @functools.cached_property
  def _records(self):
    import tensorflow_datasets as tfds  # Slow to import; workers start lazily.

    allow_open_files(len(self._counts[self._split]))
    # Its decorator hides the signature.
    builder: Any = tfds.builder_from_directory(str(self._path))
    skip = tfds.decode.SkipDecoding()
    return builder.as_data_source(
      split=self._split, decoders=dict.fromkeys(self._encoded, skip)
    )

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_records"}

  def __len__(self) -> int:
    return sum(self._counts[self._split])

  def __getitem__(self, index: int) -> dict[str, Any]:
    with damage_named(self._path, index):
      return self._records[index]


@contextlib.contextmanager
def damage_named(path: paths.Path, index: int) -> Iterator[None]:
  """Turns what readers raise for a damaged shard into a DataError."""
  try:
    yield
  except DataError:
    raise
  except Exception as error:  # Each reader has errors of its own.
    raise DataError(
      f"record {index} of {path} cannot be read ({paths.said(error)}); a file "
      "there is damaged or has changed since it was opened."
    ) from error


class Shards:
  """Random access to the raw records of ArrayRecord files.

  No more files are open at a time than the process may open.

  Args:
    files: paths, in order.
    lengths: records of each.
  """

  def __init__(self, files: Sequence[str], lengths: Sequence[int]):
    self._files = files
    self._starts = tuple(itertools.accumulate(lengths, initial=0))
    self._lock = threading.Lock()
    # The last one was used last.
    self._readers: collections.OrderedDict = collections.OrderedDict()
    self._most = allow_open_files(len(files))

  def __getitem__(self, index: int) -> bytes:
    if not 0 <= index < self._starts[-1]:
      raise IndexError(f"there is no record {index}")
    number = bisect.bisect_right(self._starts, index) - 1
    reader = self._reader(number)
    record = reader.read([index - self._starts[number]])[0]
    if not record:  # What the reader makes of a file that was cut short.
      raise ValueError("nothing is there")
    return record

  def _reader(self, number: int) -> Any:
    from array_record.python import array_record_module  # Slow to import.

    with self._lock:
      reader = self._readers.pop(number, None)
      if reader is None:
        while len(self._readers) >= self._most:
          self._readers.popitem(last=False)  # Closed once nobody reads it.
        reader = array_record_module.ArrayRecordReader(
          self._files[number],
          options="readahead_buffer_size:0",
          file_reader_buffer_size=32768,
        )
      self._readers[number] = reader
      return reader


def allow_open_files(wanted: int) -> int:
  """Raises the process's soft limit where it is too low for `wanted` files at
  a time; how many of them it may open, at least one."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = wanted + _KEPT_FREE
  unlimited = resource.RLIM_INFINITY
  if soft != unlimited and soft < needed:
    soft = needed if hard == unlimited else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == unlimited or soft >= needed:
    return max(wanted, 1)
  # Of a low limit, three quarters: the rest is for everything else.
  return max(min(wanted, max(soft - _KEPT_FREE, soft * 3 // 4)), 1)
