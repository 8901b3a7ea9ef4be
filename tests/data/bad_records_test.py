"""Records of one's own masks: bad ones cost only themselves, up to a share."""

import json

import numpy as np
import pytest
from data import layouts
from PIL import Image

from argenseg_jax.data import pipeline
from argenseg_jax.data.errors import DataError
from argenseg_jax.types import CODE_TARGET, Batch


def _rows(path, **changes):
  values = {"sequence_length": 64, "mask_side": 32, "max_masks": 1, "seed": 3}
  values |= {"mask_intermediate_side": None} | changes
  return layouts.rows(path=str(path), source="jsonl", **values)


@pytest.fixture
def own_masks(tmp_path):
  records = []
  for i in range(6):
    pixels = np.full((20, 30, 3), 40 * i, np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    seg_mask = np.zeros((20, 30), np.uint8)
    seg_mask[:, : 5 * i + 2] = 255
    Image.fromarray(seg_mask).save(tmp_path / f"m{i}.png")
    records.append(
      {
        "image": f"{i}.png",
        "mask": [f"m{i}.png", f"m{5 - i}.png"] if i == 2 else f"m{i}.png",
        "conversations": [
          {"from": "human", "value": "<image>\n" + "long " * (40 * (i == 3))},
          {"from": "gpt", "value": "<mask>" * (2 if i == 2 else 1)},
        ],
      }
    )
  path = tmp_path / "own.jsonl"
  path.write_text("\n".join(map(json.dumps, records)))
  return path


def test_bad_records_become_rows_of_no_weight(own_masks):
  rows = _rows(own_masks, max_bad_share=1.0)
  truncated = own_masks.parent / "4.png"
  truncated.write_bytes(truncated.read_bytes()[:50])
  (own_masks.parent / "m5.png").unlink()
  named = {}

  def on_bad_record(index, message):
    assert index not in named
    named[index] = message

  iterator = pipeline.TrainIterator(rows, 6, on_bad_record=on_bad_record)
  batches = [next(iterator) for _ in range(3)]
  iterator.close()
  batch = Batch(*map(np.concatenate, zip(*batches, strict=True)))
  bad = np.isin(batch.sample_id, [2, 4, 5])
  np.testing.assert_array_equal(batch.sample_weight, 1 - bad)
  assert not batch.segment_ids[bad].any()
  assert not batch.mask_valid[bad].any()
  assert iterator.num_bad_records == 3
  assert iterator.num_cut_records == 1
  # The long request fills its row, with the codes of its mask.
  (long,) = np.flatnonzero(batch.sample_id[:6] == 3)
  assert batch.segment_ids[long].all()
  assert (batch.targets[long] == CODE_TARGET).sum() == 5
  assert "line 3 has 2 masks; max_masks is 1" in named[2]
  assert "4.png" in named[4]
  assert "m5.png" in named[5]
  named.clear()
  (batch,) = pipeline.eval_batches(rows, 6, on_bad_record=on_bad_record)
  assert batch.sample_weight.tolist() == [1, 1, 0, 1, 0, 0]
  assert sorted(named) == [2, 4, 5]


def test_too_many_bad_records_stop_training(own_masks):
  rows = _rows(own_masks, sequence_length=9)
  iterator = pipeline.TrainIterator(rows, 3)
  with pytest.raises(DataError, match=r"at least 3 of 6 records are bad, more"):
    next(iterator)
  iterator.close()


def test_several_masks_keep_their_order(own_masks):
  rows = _rows(own_masks, max_masks=2)
  batch = next(pipeline.eval_batches(rows, 3))
  assert batch.mask_valid.tolist() == [[True, False]] * 2 + [[True, True]]
  areas = (batch.seg_masks[2] > 127).mean((1, 2, 3))
  np.testing.assert_allclose(areas, [12 / 30, 17 / 30], atol=0.02)
