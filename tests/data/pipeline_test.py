"""Batches are a pure function of seed and step, whatever reads them."""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.config import DataConfig
from argenseg_jax.data import pipeline, text
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.ref_shapes import builder
from argenseg_jax.data.sources.registry import Mixture, open_source
from argenseg_jax.types import CODE_TARGET, Batch

TOKENIZER = text.TextTokenizer()
NUM_TRAIN = 50


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = builder.prepare(
    tmp_path_factory.mktemp("shapes"),
    num_train=NUM_TRAIN,
    num_eval=10,
    image_side=48,
  )
  return DataConfig(
    path=str(folder),
    source="ref_shapes",
    request="free",
    answer="<mask>",
    protocol="per_expression",
    sequence_length=64,
    image_side=32,
    mask_side=32,
    mask_intermediate_side=None,
    mask_channels=1,
    seed=3,
  )


def _rows(config, **changes):
  config = dataclasses.replace(config, **changes)
  return RowMaker(
    open_source(config),
    config,
    tokenizer=TOKENIZER,
    image_tokens=4,
    num_codes=5,
  )


def _take(iterator, count):
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


def _join(batches):
  return Batch(*map(np.concatenate, zip(*batches, strict=True)))


def _assert_same(got, wanted):
  for name, a, b in zip(Batch._fields, got, wanted, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=name)


def test_shapes_and_values(config):
  rows = _rows(config)
  (batch,) = _take(pipeline.TrainIterator(rows, 16), 1)
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch._asdict().items()}
  wanted = {
    "tokens": ((16, 64), "int32"),
    "targets": ((16, 64), "int32"),
    "positions": ((16, 64), "int32"),
    "segment_ids": ((16, 64), "int32"),
    "is_prompt": ((16, 64), "bool"),
    "images": ((16, 1, 32, 32, 3), "uint8"),
    "seg_masks": ((16, 1, 32, 32, 1), "uint8"),
    "mask_valid": ((16, 1), "bool"),
    "sample_weight": ((16,), "float32"),
    "sample_id": ((16,), "int64"),
  }
  assert {name: shapes[name] for name in wanted} == wanted
  assert (batch.sample_weight == 1).all()
  for i, index in enumerate(batch.sample_id):
    sample = rows.source[int(index)]
    absent = sample.kind == "absent"
    assert (batch.targets[i] == CODE_TARGET).sum() == (0 if absent else 5)
    assert batch.mask_valid[i, 0] == batch.seg_masks[i].any() == (not absent)
    said = TOKENIZER.decode(batch.tokens[i])
    assert any(f"\n{e}\n" in said for e in sample.expressions)
    assert ("no such thing" in said) == absent
    picture = Image.fromarray(sample.load_image()).resize((32, 32), 3)
    np.testing.assert_array_equal(batch.images[i, 0], np.array(picture))


def test_each_epoch_visits_every_record_in_a_new_order(config):
  ids = _join(_take(pipeline.TrainIterator(_rows(config), 10), 15)).sample_id
  epochs = ids.reshape(3, NUM_TRAIN)
  for epoch in epochs:
    assert sorted(epoch) == list(range(NUM_TRAIN))
  assert not (epochs[0] == epochs[1]).all()
  assert not (epochs[1] == epochs[2]).all()
  other = _take(pipeline.TrainIterator(_rows(config, seed=4), 10), 5)
  assert not (_join(other).sample_id == epochs[0]).all()


def test_sources_of_a_mixture_are_shuffled_anew_each_epoch(config):
  source = _rows(config).source
  mixture = Mixture((source, source), (1.0, 1.0), ("", ""))
  order = pipeline._order(SimpleNamespace(config=config, source=mixture))
  drawn = np.array([order[i] for i in range(4 * NUM_TRAIN)])
  first, second = (
    drawn[(drawn >= start) & (drawn < start + NUM_TRAIN)] - start
    for start in mixture.offsets[:2]
  )
  epochs = [*first.reshape(2, -1), *second.reshape(2, -1)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(NUM_TRAIN))
  for one, other in itertools.combinations(epochs, 2):
    assert not (one == other).all()


@pytest.mark.parametrize(
  "speed",
  [
    {"threads": 0, "prefetch": 0},
    {"threads": 3},
    {"cache": True},
    pytest.param({"workers": 2}, marks=pytest.mark.slow),
  ],
)
def test_speed_settings_change_nothing(config, speed):
  wanted = _take(pipeline.TrainIterator(_rows(config), 8), 9)
  got = _take(pipeline.TrainIterator(_rows(config, **speed), 8), 9)
  _assert_same(_join(got), _join(wanted))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batches_of_one(config, hosts):
  wanted = _take(pipeline.TrainIterator(_rows(config), 8), 9)
  shares = [
    _take(
      pipeline.TrainIterator(_rows(config), 8, host_index=h, host_count=hosts),
      9,
    )
    for h in range(hosts)
  ]
  for step, batch in enumerate(wanted):
    _assert_same(_join([share[step] for share in shares]), batch)


def test_resuming_is_exact_in_the_middle_of_an_epoch(config):
  whole = _take(pipeline.TrainIterator(_rows(config), 8), 12)
  first = pipeline.TrainIterator(_rows(config), 8)
  _assert_same(_join(_take(first, 4)), _join(whole[:4]))
  state = json.loads(json.dumps(first.state()))
  assert state["next_index"] == 32
  assert state["seed"] == 3
  # The iterator itself goes on after being closed, too.
  _assert_same(_join(_take(first, 2)), _join(whole[4:6]))
  # Two hosts, other speed settings, one of them already at another step.
  shares = []
  for host in range(2):
    resumed = pipeline.TrainIterator(
      _rows(config, threads=2, cache=True), 8, host_index=host, host_count=2
    )
    next(resumed)
    resumed.set_state(state)
    assert resumed.step == 4
    shares.append(_take(resumed, 8))
  for step, batch in enumerate(whole[4:]):
    _assert_same(_join([share[step] for share in shares]), batch)


def _hash(batch):
  return hashlib.sha256(b"".join(a.tobytes() for a in batch)).hexdigest()


@pytest.fixture(scope="module")
def wanted(config):
  """The first global batches of one host without workers."""
  return _take(pipeline.TrainIterator(_rows(config), 8), 8)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize(
  "workers", [0, 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_batches_depend_on_seed_and_step_alone(config, wanted, workers, hosts):
  """From the start, and resumed in the middle of an epoch (which has 6.25
  batches) from what one host without workers saved."""
  saved = pipeline.TrainIterator(_rows(config), 8)
  _take(saved, 4)
  # Processes are slow to start: the last host stands for all, and resumes.
  start = 4 if workers else 0
  for host in range(hosts - 1 if workers else 0, hosts):
    rows = _rows(config, workers=workers)
    iterator = pipeline.TrainIterator(
      rows, 8, host_index=host, host_count=hosts
    )
    if start:
      iterator.set_state(json.loads(json.dumps(saved.state())))
    share = slice(host * 8 // hosts, (host + 1) * 8 // hosts)
    got = [_hash(batch) for batch in _take(iterator, 8 - start)]
    assert got == [_hash([a[share] for a in b]) for b in wanted[start:]]
    assert iterator.state() == saved.state() | {"next_index": 64}


@pytest.mark.parametrize(
  ("size", "hosts"),
  [
    *((size, 1) for size in (1, 3, 4, 7, 10, 11, 16)),
    *((size, 2) for size in (2, 4, 6, 10, 16)),
    *((size, 4) for size in (4, 8, 12, 20)),
  ],
)
def test_evaluation_visits_every_record_once(config, size, hosts):
  rows = _rows(config, split="val")
  shares = [
    list(pipeline.eval_batches(rows, size, host_index=h, host_count=hosts))
    for h in range(hosts)
  ]
  count = -(-10 // size)
  assert [len(s) for s in shares] == [count] * hosts
  batch = _join([share[step] for step in range(count) for share in shares])
  assert batch.sample_id[:10].tolist() == list(range(10))
  assert (batch.sample_weight[:10] == 1).all()
  assert (batch.sample_weight[10:] == 0).all()
  assert (batch.sample_id[10:] == -1).all()
  assert not batch.segment_ids[10:].any()
  for host, share in enumerate(shares):  # Gone on with after a batch.
    rest = pipeline.eval_batches(
      rows, size, host_index=host, host_count=hosts, first=1
    )
    for got, wanted in zip(rest, share[1:], strict=True):
      _assert_same(got, wanted)


def test_protocols(config):
  def said(**changes):
    batches = pipeline.eval_batches(_rows(config, split="val", **changes), 10)
    return [TOKENIZER.decode(t) for t in next(batches).tokens]

  source = _rows(config, split="val").source
  merged = said(protocol="merged")
  dotted = said(protocol="merged", join="evaluation")
  single = said()
  for i in range(10):
    expressions = source[i].expressions
    assert "\n" + ", ".join(expressions) + "\n" in merged[i]
    assert "".join(f" {e}." for e in expressions) in dotted[i]
    assert f"\n{expressions[0]}\n" in single[i]


def test_evaluation_asks_for_each_expression(config):
  rows = _rows(config, split="val")
  rows.source = open_source(rows.config, evaluation=True)
  single = open_source(rows.config)
  wanted = [e for i in range(10) for e in single[i].expressions]
  batch = _join(list(pipeline.eval_batches(rows, 8)))
  said = [TOKENIZER.decode(t) for t in batch.tokens[: len(wanted)]]
  assert batch.sample_weight.sum() == len(rows.source) == len(wanted) > 10
  assert all(f"\n{e}\n" in s for e, s in zip(wanted, said, strict=True))
  assert rows.source.fingerprint != single.fingerprint
  merged = dataclasses.replace(rows.config, protocol="merged")
  assert len(open_source(merged, evaluation=True)) == 10


def test_answers_describe_the_target(config):
  rows = _rows(config, split="val", answer="the {description}<mask>")
  batch = next(pipeline.eval_batches(rows, 10))
  for i in range(10):
    sample = rows.source[i]
    said = TOKENIZER.decode(batch.tokens[i])
    assert bool(sample.description) == bool(sample.seg_masks)
    assert (f"\nthe {sample.description}\n" in said) == bool(sample.seg_masks)
  undescribed = dataclasses.replace(rows.source[0], description="")
  rows.source = [undescribed]
  assert "data.answer" in rows(0).error


def test_jpeg_quality_is_drawn_in_training_alone(config):
  rows, plain = _rows(config, jpeg_quality=20), _rows(config)
  (batch,) = _take(pipeline.TrainIterator(rows, 8), 1)
  (wanted,) = _take(pipeline.TrainIterator(plain, 8), 1)
  off = np.abs(batch.images.astype(int) - wanted.images).mean((1, 2, 3, 4))
  assert (off > 0).all()
  assert (off < 20).all()
  assert len(set(off)) > 1
  for name in ("seg_masks", "sample_id"):
    np.testing.assert_array_equal(getattr(batch, name), getattr(wanted, name))
  _assert_same(next(pipeline.TrainIterator(rows, 8)), batch)
  asked = [next(pipeline.eval_batches(r, 4)) for r in (rows, plain)]
  _assert_same(*asked)


def test_masks_alone_for_the_image_tokenizer(config):
  rows = _rows(config, sequence_length=0, max_images=0)
  (batch,) = _take(pipeline.TrainIterator(rows, 8), 1)
  assert batch.tokens.shape == (8, 0)
  assert batch.images.shape == (8, 0, 32, 32, 3)
  assert batch.seg_masks.any()


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_dead_worker_is_an_error(config, evaluates):
  rows = _rows(config, workers=1, prefetch=1)
  if evaluates:
    batches = pipeline.eval_batches(rows, 2)
  else:
    batches = pipeline.TrainIterator(rows, 2)
  next(batches)
  (worker,) = multiprocessing.active_children()
  worker.kill()
  killed = time.monotonic()
  with pytest.raises(DataError, match="a data worker died"):
    list(itertools.islice(batches, 20))
  assert time.monotonic() - killed < 30
  batches.close()


def test_hosts_must_divide_the_batch(config):
  with pytest.raises(DataError, match="9 does not divide over 2 hosts"):
    pipeline.TrainIterator(_rows(config), 9, host_count=2)
  with pytest.raises(DataError, match="9 does not divide over 2 hosts"):
    next(pipeline.eval_batches(_rows(config), 9, host_count=2))
