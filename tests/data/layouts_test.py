"""Every layout opens, gives what was written, and becomes rows."""

import dataclasses
import pickle

import numpy as np
import pytest
from data import layouts

from argenseg_jax.config import DataConfig
from argenseg_jax.data import text
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.pipeline import TrainIterator, eval_batches
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.types import CODE_TARGET

TOKENIZER = text.TextTokenizer()
LEFT, RIGHT = layouts.LEFT, layouts.RIGHT


def _config(keys, **changes):
  return DataConfig(
    **{
      "sequence_length": 160,
      "image_side": 16,
      "mask_side": 16,
      "mask_intermediate_side": None,
      "mask_channels": 1,
      **keys,
      **changes,
    }
  )


def _rows(config, **kwargs):
  source = open_source(config, **kwargs)
  return RowMaker(
    source, config, tokenizer=TOKENIZER, image_tokens=4, num_codes=5
  )


@pytest.fixture
def opened(tmp_path):
  def open_layout(layout, **changes):
    return open_source(_config(layouts.write(layout, tmp_path), **changes))

  return open_layout


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_becomes_rows(layout, tmp_path):
  config = _config(layouts.write(layout, tmp_path))
  rows = _rows(config)
  copy = pickle.loads(pickle.dumps(rows.source))
  assert copy.fingerprint == rows.source.fingerprint
  for index in range(len(rows.source)):
    row = rows(index)
    assert not row.error
    masks = int(row.fields.mask_valid.sum())
    assert (row.fields.targets == CODE_TARGET).sum() == 5 * masks
    assert copy[index].where == rows.source[index].where
  # What is asked for at a visit is drawn, but always the same draw.
  first, second = (next(TrainIterator(rows, 4)) for _ in range(2))
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)
  for protocol in ("merged", "per_expression"):
    asked = _rows(
      dataclasses.replace(config, protocol=protocol), evaluation=True
    )
    batches = list(eval_batches(asked, 4))
    weight = sum(batch.sample_weight.sum() for batch in batches)
    assert weight == len(asked.source) >= len(rows.source)


def test_refer(opened, tmp_path):
  source = opened("refer")
  assert len(source) == 2
  assert source[1].expressions == ("left box", "the red one")
  np.testing.assert_array_equal(source[0].load_seg_mask() > 0, LEFT)
  with pytest.raises(DataError, match="no split 'tset'; it has train, val"):
    opened("refer", split="tset")
  (tmp_path / "refs(google).p").write_bytes(b"")
  with pytest.raises(
    DataError, match=r"must contain exactly one refs\(\*\)\.p"
  ):
    open_source(_config({"source": "refer", "path": str(tmp_path)}))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
  class Evil:
    def __reduce__(self):
      return (print, ("run",))

  (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Evil()]))
  with pytest.raises(
    DataError, match=r"plain lists .* asks for builtins\.print"
  ):
    open_source(_config({"source": "refer", "path": str(tmp_path)}))


def test_grefer_joins_targets_and_knows_none(opened):
  both, none = opened("grefer")[0], opened("grefer")[1]
  np.testing.assert_array_equal(both.load_seg_mask() > 0, LEFT | RIGHT)
  assert (none.kind, none.seg_masks) == ("absent", ())


def test_reason_seg_cuts_out_what_is_to_be_ignored(opened):
  sample = opened("reason_seg")[0]
  np.testing.assert_array_equal(sample.load_seg_mask() > 0, LEFT)
  assert (sample.request, sample.expressions) == (
    "reasoning",
    ("what is warm",),
  )


@pytest.mark.parametrize(
  ("layout", "names"),
  [("coco_panoptic", ("person", "floor")), ("ade20k", ("wall", "sky"))],
)
def test_semantic_layouts_ask_for_one_class(layout, names, tmp_path):
  config = _config(layouts.write(layout, tmp_path))
  for number, truth in enumerate((LEFT, RIGHT)):
    sample = open_source(config)[0].choose(number)
    assert sample.expressions == (names[number],)
    np.testing.assert_array_equal(sample.load_seg_mask() > 0, truth)
  asked = open_source(config, evaluation=True)
  assert [s.expressions[0] for s in asked] == list(names) * 2
  batches = TrainIterator(_rows(config), 2)
  seen = set()
  for _ in range(8):
    for tokens in next(batches).tokens:
      said = TOKENIZER.decode(tokens)
      seen |= {n for n in names if f"Please segment {n} in this image." in said}
  assert seen == set(names)


def test_folder(opened):
  source = opened("folder")
  assert source[0].expressions == ("left box", "the red one")
  np.testing.assert_array_equal(source[0].load_seg_mask() > 0, LEFT)
  assert (source[1].kind, source[1].seg_masks) == ("absent", ())


def test_refcoco_m(opened, tmp_path):
  source = opened("refcoco_m")
  assert len(source) == 4
  assert source[0].expressions == ("left box", "the red one")
  for index, truth in enumerate((LEFT, RIGHT, LEFT, RIGHT)):
    np.testing.assert_array_equal(source[index].load_seg_mask(), truth)
  assert source[1].image_keys == source[0].image_keys != source[2].image_keys
  with pytest.raises(DataError, match=r"contains no validation-\*\.parquet"):
    opened("refcoco_m", split="val")
  file = tmp_path / "validation-0.parquet"
  file.write_bytes(b"PAR1")
  with pytest.raises(DataError, match="is not a parquet file"):
    open_source(_config({"source": "refcoco_m", "path": str(file)}))


def test_text_to_image_targets_are_pictures(opened, tmp_path):
  config = _config(layouts.write("text_to_image", tmp_path))
  row = _rows(config)(0).fields
  assert row.seg_masks[0].std(-1).any()
  assert not row.images.any()
  mono = _rows(dataclasses.replace(config, mask_channels=1))(0)
  assert "data.mask_channels" in mono.error


def test_meta_mixes_by_weight(tmp_path):
  rows = _rows(_config(layouts.write("meta", tmp_path)))
  assert len(rows.source) == 7
  batches = TrainIterator(rows, 15)
  ids = np.concatenate([next(batches).sample_id for _ in range(2)])
  # 5 chat records once, 2 references five times, in each 15.
  for half in ids.reshape(2, 15):
    assert sorted(half[half < 5]) == [0, 1, 2, 3, 4]
    assert (half >= 5).sum() == 10
  assert rows.source[6].where.endswith("ref_id 1")


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ('{"x": {}}', 'needs "annotation"'),
    ('{"x": {"annotation": "data.jsonl", "lenght": 1}}', "key 'lenght'"),
    ('{"x": {"annotation": "data.jsonl", "length": 9}}', "says length 9, but"),
    ('{"x": {"annotation": "data.jsonl", "source": "c"}}', "has source 'c'"),
    ('{"x": {"annotation": "data.jsonl", "request": "c"}}', "request 'c'"),
    ('{"x": {"annotation": "data.jsonl", "weight": 0}}', "above 0"),
    ("{}", "names no data set"),
  ],
)
def test_bad_meta_files_are_named(entry, message, tmp_path):
  keys = layouts.write("meta", tmp_path)
  (tmp_path / "meta.json").write_text(entry)
  with pytest.raises(DataError, match=message):
    open_source(_config(keys))
