"""Packed records give the rows of the source that they were packed from."""

import dataclasses
import os
import sys

import numpy as np
import pytest
from data import layouts

from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data import array_record_writer, text
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.pipeline import TrainIterator
from argenseg_jax.data.sources import array_record, sample
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.runtime import lock

TOKENIZER = text.TextTokenizer()


def _rows(config, **kwargs):
  return RowMaker(
    open_source(config, **kwargs),
    config,
    tokenizer=TOKENIZER,
    image_tokens=4,
    num_codes=5,
  )


def _config(layout, folder):
  folder.mkdir()
  return DataConfig(
    **{"mask_channels": 1, **layouts.write(layout, folder)},
    sequence_length=160,
    image_side=16,
    mask_side=16,
  )


def _packed(config, out):
  return dataclasses.replace(
    config, source="array_record", path=str(out), root=None
  )


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_packed_records_give_the_same_batches(layout, tmp_path):
  config = _config(layout, tmp_path / "from")
  if layout == "meta":  # A mixture has an order of its own.
    config = dataclasses.replace(config, source="refer")
    config = dataclasses.replace(config, path=str(tmp_path / "from" / "refs"))
  out = tmp_path / "packed"
  rows = _rows(config)
  built = array_record_writer.build(
    {"train": rows.source}, out, records_per_shard=2
  )
  assert built["train"] == (len(rows.source), [])
  packed = _rows(_packed(config, out))
  for a, b in zip(
    next(TrainIterator(rows, 6)), next(TrainIterator(packed, 6)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  for index in range(len(rows.source)):
    assert packed.source[index].where == rows.source[index].where
  # Every class or object is asked for once in evaluation here, too.
  asked = [_rows(c, evaluation=True).source for c in (config, packed.config)]
  assert len(asked[0]) == len(asked[1])


def test_several_splits_processes_and_shards(tmp_path):
  config = _config("refer", tmp_path / "from")
  sources = {
    split: open_source(dataclasses.replace(config, split=split))
    for split in ("train", "val")
  }
  done = []
  for name, workers in (("one", 1), ("two", 2)):
    array_record_writer.build(
      sources,
      tmp_path / name,
      records_per_shard=1,
      workers=workers,
      on_progress=done.append,
    )
  assert done == [1, 2, 3] * 2
  _assert_same_folders(tmp_path / "one", tmp_path / "two")
  assert (tmp_path / "one/packed-train.array_record-00001-of-00002").is_file()
  packed = [
    open_source(dataclasses.replace(_packed(config, tmp_path / "one"), split=s))
    for s in sources
  ]
  assert [len(p) for p in packed] == [2, 1]
  assert packed[0].fingerprint != packed[1].fingerprint
  with pytest.raises(DataError, match="exists; give another folder"):
    array_record_writer.build(sources, tmp_path / "one")


def _assert_same_folders(one, two):
  """Our note holds digests of all records."""
  names = {path.name for path in one.iterdir()}
  assert names == {path.name for path in two.iterdir()}
  assert {"source.json", "dataset_info.json", "features.json"} <= names
  note = (one / "source.json").read_text()
  assert note == (two / "source.json").read_text()


class _Interrupted(Exception):
  pass


class _Stops:
  """A source that fails at a record, and counts what is read."""

  def __init__(self, source: sample.Source, stop: int | None):
    self._source, self._stop, self.read = source, stop, []
    self.fingerprint = source.fingerprint

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if index == self._stop:
      raise _Interrupted
    self.read.append(index)
    return self._source[index]


def test_an_interrupted_build_goes_on(tmp_path):
  config = _config("jsonl", tmp_path / "from")
  source = open_source(config)
  whole, out = tmp_path / "whole", tmp_path / "out"
  array_record_writer.build({"train": source}, whole, records_per_shard=2)
  with pytest.raises(_Interrupted):
    array_record_writer.build(
      {"train": _Stops(source, 3)}, out, records_per_shard=2
    )
  assert not out.exists()
  with pytest.raises(DataError, match="interrupted build of other data"):
    array_record_writer.build({"train": source}, out, records_per_shard=3)
  rest = _Stops(source, None)
  array_record_writer.build({"train": rest}, out, records_per_shard=2)
  assert rest.read == [2, 3, 4]
  _assert_same_folders(whole, out)


def test_bad_records_are_left_out_up_to_a_share(tmp_path):
  config = _config("jsonl", tmp_path / "from")
  (tmp_path / "from" / "b.jpg").write_bytes(b"no picture")
  source = open_source(config)
  with pytest.raises(DataError, match="2 of 5 records of split 'train'"):
    array_record_writer.build(
      {"train": source}, tmp_path / "out", max_bad_share=0.3
    )
  built = array_record_writer.build(
    {"train": source}, tmp_path / "out", max_bad_share=0.5
  )
  assert built["train"].records == 3
  assert [f.split(":")[0] for f in built["train"].faults] == [
    "record 1",
    "record 3",
  ]
  packed = open_source(_packed(config, tmp_path / "out"))
  assert [s.images != () for s in map(packed.__getitem__, range(3))] == [
    True,
    True,
    False,
  ]


def test_resized_pictures_are_what_the_rows_would_hold(tmp_path):
  config = _config("refer", tmp_path / "from")
  rows, out = _rows(config), tmp_path / "packed"
  array_record_writer.build(
    {"train": rows.source}, out, resizing=array_record.Resizing.of(config)
  )
  packed = _rows(_packed(config, out))
  stored = packed.source[0]
  assert stored.load_image().shape == (16, 16, 3)
  assert stored.size == layouts.SIZE
  for a, b in zip(
    next(TrainIterator(rows, 6)), next(TrainIterator(packed, 6)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  for changes in (
    {"image_side": 8},
    {"resize": "opencv"},
    {"pad_square": True},
    {"jpeg_quality": 75},
  ):
    other = dataclasses.replace(packed.config, **changes)
    with pytest.raises(DataError, match="built with --resize_pictures for "):
      open_source(other)
    open_source(dataclasses.replace(other, max_images=0))  # Masks alone.
  with pytest.raises(DataError, match="pack the source that they came from"):
    array_record_writer.build({"train": packed.source}, tmp_path / "again")


def test_beam_writes_the_same_shards(tmp_path):
  pytest.importorskip("apache_beam")
  config = _config("refer", tmp_path / "from")
  sources = {
    split: open_source(dataclasses.replace(config, split=split))
    for split in ("train", "val")
  }
  beam = "--runner=DirectRunner --direct_num_workers=1"
  for name, options in (("here", None), ("there", beam)):
    array_record_writer.build(
      sources, tmp_path / name, records_per_shard=1, beam=options
    )
  _assert_same_folders(tmp_path / "here", tmp_path / "there")
  with pytest.raises(DataError, match="no pipeline option '--runer=x'"):
    array_record_writer.build(sources, tmp_path / "no", beam="--runer=x")


def test_beam_is_an_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  config = _config("refer", tmp_path / "from")
  with pytest.raises(DataError, match=r"pip install .*\[beam\]"):
    array_record_writer.build(
      {"train": open_source(config)}, tmp_path / "no", beam=""
    )


def test_a_build_heals_what_a_kill_has_left(tmp_path):
  config = _config("refer", tmp_path / "from")
  sources = {"train": open_source(config)}
  array_record_writer.build(sources, tmp_path / "whole", records_per_shard=1)

  def interrupted(done):
    raise KeyboardInterrupt

  for damage in ("train-00000", "train-00000.json", "plan.json"):
    out = tmp_path / damage.replace(".", "_")
    work = out.with_name(f"{out.name}.incomplete")
    with pytest.raises(KeyboardInterrupt):
      array_record_writer.build(
        sources, out, records_per_shard=1, on_progress=interrupted
      )
    os.truncate(work / damage, 0)
    array_record_writer.build(sources, out, records_per_shard=1)
    _assert_same_folders(tmp_path / "whole", out)
    assert not work.exists()


def test_two_builds_of_one_folder_do_not_meet(tmp_path):
  config = _config("refer", tmp_path / "from")
  sources = {"train": open_source(config)}
  with (
    lock.owned(tmp_path / "out.incomplete"),
    pytest.raises(ConfigError, match=r"out\.incomplete is in use by process"),
  ):
    array_record_writer.build(sources, tmp_path / "out")
