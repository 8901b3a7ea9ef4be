"""Packed rows train as the samples in them would alone."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_rows
from flax import nnx

from argenseg_jax.config import LossConfig
from argenseg_jax.data.packing import Packer
from argenseg_jax.data.pipeline import TrainIterator
from argenseg_jax.training.objectives import mllm_loss
from argenseg_jax.types import CODE_TARGET, Batch


def _take(rows, size, count=1):
  iterator = TrainIterator(rows, size)
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


@pytest.mark.parametrize(
  "changes",
  [{}, {"bidirectional_prompt": True, "full_attention_in_scale": True}],
)
def test_the_loss_is_that_of_the_samples_alone(changes, tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path, sequence_length=384)
  packed = tiny_rows.of(dataclasses.replace(rows.config, pack=3))
  graph, state = nnx.split(tiny_rows.model(**changes))
  config = LossConfig(
    "scale", drop_scale_inputs=0.0, z_loss=0.0, implementation="auto"
  )

  @jax.jit
  def loss(state, batch):
    return mllm_loss(nnx.merge(graph, state), batch, config)

  (alone,), (together,) = _take(rows, 6), _take(packed, 2)
  assert together.tokens.shape == (2, 384)
  assert together.images.shape == (2, 3, 16, 16, 3)
  assert together.segment_ids.max(1).tolist() == [3, 3]
  (a, sums), (b, packed_sums) = (loss(state, x) for x in (alone, together))
  np.testing.assert_allclose(a, b, rtol=2e-6)
  for one, other in zip(sums, packed_sums, strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-6)
  assert sums.code_count.sum() >= 6 * 21


def test_a_row_holds_its_samples_in_order(tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path, sequence_length=384, pack=3)
  # Text alone first, so that places for pictures and masks close up.
  row = Packer(rows)(np.array([4, 1, 0]), np.random.default_rng(0)).fields
  text, two, one = (rows(i).fields for i in (4, 1, 0))
  start = 0
  for number, alone in enumerate((text, two, one), 1):
    size = np.count_nonzero(alone.segment_ids)
    part = slice(start, start + size)
    assert (row.segment_ids[part] == number).all()
    for name in ("tokens", "targets", "positions", "is_prompt"):
      np.testing.assert_array_equal(
        getattr(row, name)[part], getattr(alone, name)[:size], err_msg=name
      )
    start += size
  assert not row.segment_ids[start:].any()
  assert row.mask_valid.tolist() == [True] * 3 + [False] * 3
  np.testing.assert_array_equal(row.seg_masks[:2], two.seg_masks)
  np.testing.assert_array_equal(row.seg_masks[2], one.seg_masks[0])
  np.testing.assert_array_equal(row.images[0], two.images[0])
  np.testing.assert_array_equal(row.images[1], one.images[0])
  assert not row.images[2].any()


def test_the_longest_is_cut_where_samples_do_not_fit_together(tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path, sequence_length=384, pack=2)
  long, short = (np.count_nonzero(rows(i).fields.segment_ids) for i in (0, 3))
  assert long > short

  def pack(length):
    config = dataclasses.replace(rows.config, sequence_length=length)
    packer = Packer(tiny_rows.of(config))
    return packer(np.array([0, 3]), np.random.default_rng(0))

  row = pack(long + short - 2)
  assert row.cut == (0,)
  assert np.bincount(row.fields.segment_ids).tolist() == [0, long - 2, short]
  assert (row.fields.targets == CODE_TARGET).sum() == 21
  # Its codes cannot be cut: then it is a bad record.
  row = pack(long + short - 20)
  assert "does not fit" in row.error
  assert [index for index, _ in row.bad] == [0]
  assert np.count_nonzero(row.fields.segment_ids) == short


def test_bad_records_get_no_segment(tmp_path):
  rows = tiny_rows.write(
    "jsonl", tmp_path, sequence_length=384, pack=5, max_bad_share=1.0
  )
  (tmp_path / "b.jpg").unlink()
  named = {}
  iterator = TrainIterator(rows, 1, on_bad_record=named.__setitem__)
  batch = next(iterator)
  iterator.close()
  assert sorted(named) == [1, 3]
  assert batch.segment_ids.max() == 3
  assert batch.sample_weight.tolist() == [1]
  bad = Packer(rows)(np.array([1, 3]), np.random.default_rng(0)).fields
  assert bad.sample_weight == 0
  assert not bad.segment_ids.any()


def test_packed_batches_resume_and_split_over_hosts(tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path, sequence_length=384, pack=2)
  wanted = _take(rows, 4, 6)
  first = TrainIterator(rows, 4)
  for _ in range(3):
    next(first)
  first.close()
  shares = []
  for host in range(2):
    resumed = TrainIterator(rows, 4, host_index=host, host_count=2)
    resumed.set_state(first.state())
    shares.append([next(resumed) for _ in range(3)])
    resumed.close()
  for batch, *parts in zip(wanted[3:], *shares, strict=True):
    joined = Batch(*map(np.concatenate, zip(*parts, strict=True)))
    for a, b in zip(joined, batch, strict=True):
      np.testing.assert_array_equal(a, b)
