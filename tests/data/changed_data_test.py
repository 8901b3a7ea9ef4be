"""A saved state goes on with the data it belongs to, or when it is forced."""

import json
import os

import numpy as np
import pytest
from data import layouts

from argenseg_jax.config import DataConfig
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.data import text
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.pipeline import TrainIterator
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.training.batches import open_batches

TOKENIZER = text.TextTokenizer()


def _iterator(keys, size=2, **changes):
  return TrainIterator(_rows(keys, **changes), size)


def _rows(keys, **changes):
  config = DataConfig(
    **{
      "sequence_length": 160,
      "image_side": 16,
      "mask_side": 16,
      "mask_intermediate_side": None,
      "mask_channels": 1,
      "threads": 0,
      "prefetch": 0,
      **keys,
      **changes,
    }
  )
  return RowMaker(
    open_source(config),
    config,
    tokenizer=TOKENIZER,
    image_tokens=4,
    num_codes=5,
  )


def _assert_refused(iterator, state, said=""):
  with pytest.raises(DataError, match=f"{said}.*--accept_changed_data"):
    iterator.set_state(state)
  iterator.set_state(state, force=True)


def _change(path, old, new):
  content = path.read_text()
  assert old in content
  path.write_text(content.replace(old, new))


def test_a_changed_file_is_refused(tmp_path):
  keys = layouts.write("jsonl", tmp_path)
  state = _iterator(keys).state()
  _iterator(keys).set_state(state)
  _change(tmp_path / "data.jsonl", "left box", "wide box")
  _assert_refused(_iterator(keys), state, "other data;")
  del state["content"]  # As earlier versions saved it.
  _assert_refused(_iterator(keys), state, "other data, data settings or")


@pytest.mark.parametrize("layout", ["jsonl", "folder", "refer", "reason_seg"])
def test_a_changed_image_or_mask_is_named(layout, tmp_path):
  """Its name and size are as before; a copy has another time only."""
  keys = layouts.write(layout, tmp_path / "data")
  values = tiny.get_config()
  values.data.path = "unused"

  def open_again(**flags):
    flags = {"accept_changed_data": False, "begins": False} | flags
    open_batches(
      run_config(values),
      _rows(keys),
      None,
      tmp_path,
      global_batch_size=2,
      **flags,
    ).close()

  open_again()
  for file in (tmp_path / "data").rglob("*.*"):
    os.utime(file, (1, 1))
  open_again()
  image = max((tmp_path / "data").rglob("[ab].jpg"))
  image.write_bytes(image.read_bytes()[:-9] + bytes(9))
  with pytest.raises(DataError, match=r"record \d \(.*--accept_changed_data"):
    open_again()
  open_again(accept_changed_data=True)
  open_again()
  image.unlink()
  open_again(begins=True)  # Nothing was saved yet.
  (tmp_path / "files_main.json").write_text("{")  # As a kill may leave it.
  open_again()


@pytest.mark.parametrize(
  "changes", [{"seed": 5}, {"split": "val"}, {"answer": "<mask>."}]
)
def test_changed_settings_are_refused(changes, tmp_path):
  keys = layouts.write("refer", tmp_path)
  state = _iterator(keys).state()
  (key,) = changes
  _assert_refused(_iterator(keys, **changes), state, f"data.{key}")


def _reweigh(mixture):
  mixture["refs"]["repeat_time"] = 6


def _ask_otherwise(mixture):
  mixture["refs"]["request"] = "semantic"


def _read_another_split(mixture):
  mixture["refs"]["split"] = "val"


def _leave_out(mixture):
  del mixture["chat"]


def _add(mixture):
  mixture["more"] = mixture["refs"]


def _swap(mixture):
  mixture["chat"] = mixture.pop("chat")


@pytest.mark.parametrize(
  "change",
  [_reweigh, _ask_otherwise, _read_another_split, _leave_out, _add, _swap],
)
def test_a_changed_mixture_is_refused(change, tmp_path):
  keys = layouts.write("meta", tmp_path)
  state = _iterator(keys).state()
  _iterator(keys).set_state(state)
  mixture = json.loads((tmp_path / "meta.json").read_text())
  change(mixture)
  (tmp_path / "meta.json").write_text(json.dumps(mixture))
  _assert_refused(_iterator(keys), state)


def test_a_changed_file_of_a_mixture_is_refused(tmp_path):
  keys = layouts.write("meta", tmp_path)
  state = _iterator(keys).state()
  _change(tmp_path / "data.jsonl", "left box", "wide box")
  _assert_refused(_iterator(keys), state)


def test_another_global_batch_goes_on_with_the_next_record(tmp_path):
  keys = layouts.write("meta", tmp_path)
  whole = _iterator(keys)
  ids = np.concatenate([next(whole).sample_id for _ in range(9)])
  first = _iterator(keys)
  for _ in range(3):
    next(first)
  larger = _iterator(keys, 3)
  _assert_refused(larger, first.state(), "other global_batch_size;")
  assert larger.step == 2
  got = np.concatenate([next(larger).sample_id for _ in range(4)])
  np.testing.assert_array_equal(got, ids[6:])


def test_a_mixture_resumes_and_splits_over_hosts(tmp_path):
  rows = _rows(layouts.write("meta", tmp_path))
  whole = TrainIterator(rows, 4)
  wanted = [next(whole) for _ in range(6)]
  first = TrainIterator(rows, 4)
  for _ in range(3):
    next(first)
  for hosts in (1, 2, 4):
    shares = []
    for host in range(hosts):
      resumed = TrainIterator(rows, 4, host_index=host, host_count=hosts)
      resumed.set_state(first.state())
      shares.append([next(resumed) for _ in range(3)])
    for batch, *parts in zip(wanted[3:], *shares, strict=True):
      for a, *b in zip(batch, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(b), a)
