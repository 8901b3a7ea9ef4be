"""Every fault of a record is a row of no weight, named once, and no more."""

import json
import pickle
import re

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
from argenseg_jax.types import CODE_TARGET

NUM_CODES = 5
RUNS = {"size": list(layouts.SIZE), "counts": [1, 2, 3]}
# Of the record with that index, what is wrong; the others are good.
FAULTS = {
  1: "cannot decode image .*cut.jpg",
  2: "cannot read .*gone.jpg: No such file",
  3: "line 4: the mask has 9x7 pixels but the image 30x20",
  4: "line 5 has a mask without a single pixel",
  6: "line 7 is not JSON",
  7: "line 8 is not UTF-8 text",
  8: "line 9: the run lengths do not add up to 20x30",
  9: "cannot read .*gone.png: No such file",
}


def _rows(config):
  return RowMaker(
    open_source(config),
    config,
    tokenizer=text.TextTokenizer(),
    image_tokens=4,
    num_codes=NUM_CODES,
  )


def _config(**keys):
  return DataConfig(
    **{
      "sequence_length": 100,
      "image_side": 16,
      "mask_side": 16,
      "mask_channels": 1,
      "max_bad_share": 1.0,
      **keys,
    }
  )


@pytest.fixture
def faulty(tmp_path):
  layouts.image(tmp_path / "a.jpg", 0)
  whole = (tmp_path / "a.jpg").read_bytes()
  (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  layouts.mask(tmp_path / "left.png", layouts.LEFT)
  layouts.mask(tmp_path / "small.png", np.ones((7, 9), bool))
  layouts.mask(tmp_path / "empty.png", np.zeros(layouts.SIZE, bool))

  def line(words="the box", **changes):
    turns = layouts.chat(f"<image>\n{words}", "<mask>")
    record = {"image": "a.jpg", "mask": "left.png", "conversations": turns}
    return json.dumps(record | changes).encode()

  lines = [
    line(),
    line(image="cut.jpg"),
    line(image="gone.jpg"),
    line(mask="small.png"),
    line(mask="empty.png"),
    line(mask="empty.png", kind="absent"),
    line()[:-9],
    line("the box \N{SNOWMAN}").replace(b"box", b"b\xf6x"),
    line(mask=RUNS),
    line(mask="gone.png"),
    line("word " * 1000),
  ]
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"\n".join(lines))
  return path


def test_faulty_records_have_no_weight_and_are_logged_once(
  faulty, tmp_path, capsys
):
  values = tiny.get_config()
  values.data.path = str(faulty)
  values.data.warmup_steps = 0
  values.data.cache_codes = False
  run = run_config(values)
  rows = _rows(_config(path=str(faulty), source="jsonl"))
  log = tmp_path / "bad_records.jsonl"
  for _ in range(2):  # The second run says nothing again.
    batches = open_batches(run, rows, None, tmp_path, global_batch_size=11)
    seen = [next(batches) for _ in range(2)]
    assert batches.num_bad_records == len(FAULTS)
    assert batches.num_cut_records == 1
    batches.close()
    named = [json.loads(entry) for entry in log.read_text().splitlines()]
    assert sorted(entry["record"] for entry in named) == sorted(FAULTS)
  for entry in named:
    assert re.search(FAULTS[entry["record"]], entry["why"])
  assert capsys.readouterr().out.count("bad record") == len(FAULTS)
  for batch in seen:
    bad = np.isin(batch.sample_id, list(FAULTS))
    np.testing.assert_array_equal(batch.sample_weight, 1 - bad)
    assert not batch.segment_ids[bad].any()
    codes = (batch.targets == CODE_TARGET).sum(1)
    np.testing.assert_array_equal(codes, NUM_CODES * (1 - bad))


def _write(layout, folder, words):
  """A layout whose requests all are `words`."""
  keys = layouts.write(layout, folder)
  if layout == "folder":
    (folder / "a.txt").write_text(words)
    (folder / "b.txt").write_text(words)
  elif layout == "text_to_image":
    record = {"image": "a.jpg", "text": words}
    layouts.write_lines(folder / "pairs.jsonl", [record])
  elif layout == "grefer":
    path = folder / "grefs(unc).json"
    refs = json.loads(path.read_text())
    sentences = [{"sent": words}]
    path.write_text(json.dumps([r | {"sentences": sentences} for r in refs]))
  else:
    for path in (folder / "train").glob("*.json"):
      record = json.loads(path.read_text())
      path.write_text(json.dumps(record | {"text": [words]}))
  return keys


@pytest.mark.parametrize(
  "layout", ["folder", "grefer", "reason_seg", "text_to_image"]
)
def test_no_and_a_thousand_words_in_every_layout(layout, tmp_path):
  rows = _rows(_config(**_write(layout, tmp_path / "none", " ")))
  for i in range(len(rows.source)):
    assert re.search('an empty expression|needs "text"', rows(i).error)
    assert not rows(i).fields.sample_weight
  rows = _rows(_config(**_write(layout, tmp_path / "many", "word " * 1000)))
  for i in range(len(rows.source)):
    row = rows(i)
    assert not row.error
    assert row.cut == (i,)
    codes = (row.fields.targets == CODE_TARGET).sum()
    assert codes == NUM_CODES * row.fields.mask_valid.sum()


def test_expressions_of_no_and_of_a_thousand_words(tmp_path):
  keys = layouts.write("refer", tmp_path)
  path = tmp_path / "refs(unc).p"
  refs = pickle.loads(path.read_bytes())
  refs[0]["sentences"] = [{"sent": "  "}]
  refs[1]["sentences"] = [{"sent": "word " * 1000}]
  path.write_bytes(pickle.dumps(refs, 2))
  rows = _rows(_config(**keys))
  assert "ref_id 0 has an empty expression" in rows(0).error
  row = rows(1)
  assert not row.error
  assert row.cut == (1,)
  assert (row.fields.targets == CODE_TARGET).sum() == NUM_CODES
  refs[0]["sentences"] = []
  path.write_bytes(pickle.dumps(refs, 2))
  left = _rows(_config(**keys)).source
  assert len(left) == 1
  assert "1 references without a sentence left out" in left.notes[0]


def test_more_bad_records_than_the_share_stop_a_run(faulty):
  config = _config(path=str(faulty), source="jsonl", max_bad_share=0.5)
  iterator = TrainIterator(_rows(config), 11)
  with pytest.raises(DataError, match="8 of 11 records are bad, more than"):
    next(iterator)
  iterator.close()
