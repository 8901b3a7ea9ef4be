"""Shards of ArrayRecord: many of them, few open files, damage."""

import resource

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import tfds_records


def _write(folder, lengths, padding=0):
  files = []
  for number, length in enumerate(lengths):
    path = folder / f"{number:04d}"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in range(length):
      writer.write(b"%d %d" % (number, record) + bytes(padding))
    writer.close()
    files.append(str(path))
  return files


def test_no_more_files_are_open_than_allowed(tmp_path, monkeypatch):
  lengths = (3, 1, 2, 1, 3)
  files = _write(tmp_path, lengths)
  monkeypatch.setattr(tfds_records, "allow_open_files", lambda wanted: 2)
  shards = tfds_records.Shards(files, lengths)
  wanted = [b"%d %d" % (n, r) for n, m in enumerate(lengths) for r in range(m)]
  for order in (range(10), range(9, -1, -1), (0, 9, 4, 0, 9, 4)):
    for index in order:
      assert shards[index] == wanted[index]
      assert len(shards._readers) <= 2
  for index in (-1, 10):
    with pytest.raises(IndexError):
      shards[index]


@pytest.mark.parametrize(
  ("soft", "hard", "wanted", "allowed"),
  [
    (1024, 4096, 1500, 1500),  # The soft limit is raised.
    (1024, 1024, 1500, 768),  # It cannot be.
    (1024, resource.RLIM_INFINITY, 9000, 9000),
    (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 9000, 9000),
    (64, 64, 1500, 48),
    (1024, 4096, 10, 10),
  ],
)
def test_the_limit_of_open_files(soft, hard, wanted, allowed, monkeypatch):
  limits = [soft, hard]
  monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
  monkeypatch.setattr(
    resource, "setrlimit", lambda kind, pair: limits.__setitem__(0, pair[0])
  )
  assert tfds_records.allow_open_files(wanted) == allowed
  assert limits[0] == -1 or allowed < limits[0] <= max(hard, soft, 9256)


def test_a_shard_that_is_cut_short_is_named(tmp_path):
  (file,) = _write(tmp_path, (200,), padding=2000)
  shards = tfds_records.Shards([file], (200,))
  assert shards[0].startswith(b"0 0")
  with open(file, "r+b") as shard:
    shard.truncate(100_000)
  for records in (shards, tfds_records.Shards([file], (200,))):
    with (
      pytest.raises(DataError, match="record 199 of here cannot be read"),
      tfds_records.damage_named("here", 199),
    ):
      records[199]
