"""From a source to batches of fixed shapes, in an order that is a pure function
of (seed, step).

Position p of the endless stream is row p % B of global batch p // B, whatever
the number of hosts, processes or threads; a host makes only its own contiguous
share of each batch. The state of an iterator is therefore one number, and
resuming is exact.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from argenseg_jax.config import DataConfig, to_dict
from argenseg_jax.data import text, transforms
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import (
  EachExpression,
  JsonlSource,
  RefShapesSource,
  Sample,
  Source,
  Turn,
)
from argenseg_jax.types import Batch

# Called once for each bad record with its index and what is wrong with it.
OnBadRecord = Callable[[int, str], None]

# In an answer: what the source calls the target.
DESCRIPTION = "{description}"

# Settings that do not change what batches hold.
_SPEED_KEYS = ("workers", "threads", "prefetch", "cache", "max_bad_share")


def open_source(config: DataConfig, *, evaluation: bool = False) -> Source:
  """The source that a configuration names.

  Args:
    config: where it is.
    evaluation: under the per-expression protocol every expression becomes a
      sample of its own; in training one is drawn at each visit.

  Raises:
    DataError: it is missing, faulty or empty.
  """
  source: Source
  if config.source == "ref_shapes":
    source = RefShapesSource(config.path, config.split)
  else:
    source = JsonlSource(config.path, config.root)
  if evaluation and config.protocol == "per_expression":
    return EachExpression(source)
  return source


@dataclasses.dataclass(frozen=True)
class Row:
  """One row before batching; an `error` makes it a zero-weight substitute."""

  fields: Batch  # Without the batch axis.
  error: str = ""


class RowMaker:
  """Turns samples into rows; picklable, for worker processes.

  Args:
    source: where samples come from.
    config: what a row holds.
    tokenizer: the text tokenizer.
    image_tokens: vision embeddings that one picture gives to the model.
    num_codes: image codes of one mask.
    codes: int32 [records m num_codes], if the masks are tokenised already; the
      masks themselves are then left unread.
  """

  def __init__(
    self,
    source: Source,
    config: DataConfig,
    *,
    tokenizer: text.TextTokenizer,
    image_tokens: int,
    num_codes: int,
    codes: np.ndarray | None = None,
  ):
    self.source = source
    self.config = config
    self.tokenizer = tokenizer
    self.image_tokens = image_tokens
    self.num_codes = num_codes
    self.codes = codes
    self._cache: dict[Any, np.ndarray] = {}
    # Samples whose pictures are in the cache, without their encoded bytes.
    self._cached_samples: dict[int, Sample] = {}

  def __getstate__(self):
    return {**self.__dict__, "_cache": {}, "_cached_samples": {}}

  @property
  def fingerprint(self) -> str:
    """Changes with anything that changes the content or order of rows."""
    config = to_dict(self.config)
    for key in (*_SPEED_KEYS, "path", "root", "text_tokenizer"):
      del config[key]
    parts = (
      config,
      self.source.fingerprint,
      self.tokenizer.fingerprint,
      self.image_tokens,
      self.num_codes,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

  def __call__(self, index: int, rng: np.random.Generator | None = None) -> Row:
    """The row of a record.

    Args:
      index: of the record; beyond the last one a row of zero weight.
      rng: draws the expression in training; without it the first is taken.
    """
    if index >= len(self.source):
      return Row(self._empty(-1))
    try:
      return Row(self._make(self._sample(index), rng))
    except DataError as error:
      return Row(self._empty(index), str(error))

  def conversation(
    self, sample: Sample, rng: np.random.Generator | None = None
  ) -> tuple[Turn, ...]:
    """The turns of a sample, from its expressions or as they are stored."""
    if sample.conversation:
      return sample.conversation
    chosen = sample.expressions
    if self.config.protocol == "per_expression":
      number = 0 if rng is None else rng.integers(len(chosen))
      chosen = (chosen[number],)
    request = text.request_text(self.config.request, chosen, self.config.join)
    return (
      {"from": "human", "value": request},
      {"from": "gpt", "value": self._answer(sample)},
    )

  def _answer(self, sample: Sample) -> str:
    if not sample.seg_masks:
      return self.config.absent_answer
    if DESCRIPTION in self.config.answer and not sample.description:
      raise DataError(
        f"{sample.where} holds no description, which config key 'data.answer' "
        f"puts in place of {DESCRIPTION}."
      )
    return self.config.answer.replace(DESCRIPTION, sample.description)

  def _make(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
    config = self.config
    row = self._empty(sample.index)
    row.sample_weight[...] = 1
    if len(sample.seg_masks) > config.max_masks:
      raise DataError(
        f"{sample.where} has {len(sample.seg_masks)} masks; max_masks is "
        f"{config.max_masks}."
      )
    if config.max_images:
      if len(sample.images) > config.max_images:
        raise DataError(
          f"{sample.where} has {len(sample.images)} pictures; max_images is "
          f"{config.max_images}."
        )
      for i in range(len(sample.images)):
        row.images[i] = self._image(sample, i)
    row.mask_valid[: len(sample.seg_masks)] = True
    if self.codes is not None:
      row.codes[...] = self.codes[sample.index]
    else:
      for i in range(len(sample.seg_masks)):
        row.seg_masks[i] = self._seg_mask(sample, i)[..., None]
    if config.cache:
      self._cached_samples[sample.index] = dataclasses.replace(
        sample,
        images=(b"",) * len(sample.images),
        seg_masks=(b"",) * len(sample.seg_masks),
      )
    if config.sequence_length:
      tokens = text.tokenize_chat(
        self.tokenizer,
        self.conversation(sample, rng),
        image_tokens=(self.image_tokens,) * len(sample.images),
        num_codes=self.num_codes,
        system_message=config.system_message,
      )
      try:
        packed = text.text_row(
          (tokens,), config.sequence_length, self.tokenizer.token_ids
        )
      except DataError as error:
        raise DataError(f"{sample.where}: {error}") from error
      row = row._replace(**vars(packed))
    return row

  def _sample(self, index: int) -> Sample:
    found = self._cached_samples.get(index)
    return self.source[index] if found is None else found

  def _image(self, sample: Sample, number: int) -> np.ndarray:
    def make():
      return transforms.resize_image(
        sample.load_image(number),
        self.config.image_side,
        backend=self.config.resize,
        pad_square=self.config.pad_square,
      )

    return self._cached(("image", sample.image_keys[number]), make)

  def _seg_mask(self, sample: Sample, number: int) -> np.ndarray:
    def make():
      return transforms.mask_target(
        sample.load_seg_mask(number),
        self.config.mask_side,
        intermediate_side=self.config.mask_intermediate_side,
        backend=self.config.resize,
        pad_square=self.config.pad_square,
      )

    return self._cached(("seg_mask", sample.index, number), make)

  def _cached(self, key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
    if not self.config.cache:
      return make()
    if key not in self._cache:
      self._cache[key] = make()
    return self._cache[key]

  def _empty(self, index: int) -> Batch:
    c = self.config
    row = text.text_row((), c.sequence_length, self.tokenizer.token_ids)
    return Batch(
      **vars(row),
      images=np.zeros((c.max_images, c.image_side, c.image_side, 3), np.uint8),
      seg_masks=np.zeros(
        (c.max_masks, c.mask_side, c.mask_side, c.mask_channels), np.uint8
      ),
      mask_valid=np.zeros(c.max_masks, np.bool_),
      codes=np.zeros(
        (c.max_masks, 0 if self.codes is None else self.num_codes), np.int32
      ),
      sample_weight=np.zeros((), np.float32),
      sample_id=np.array(index, np.int64),
    )


def stack_rows(rows: list[Row]) -> tuple[Batch, list[tuple[int, str]]]:
  """A batch of numpy arrays, and the bad records in it."""
  batch = Batch(*map(np.stack, zip(*(r.fields for r in rows), strict=True)))
  bad = [(int(r.fields.sample_id), r.error) for r in rows if r.error]
  return batch, bad


class TrainIterator:
  """Endless shuffled batches, each epoch in a new order.

  Args:
    rows: makes rows.
    global_batch_size: rows of a step over all hosts.
    host_index, host_count: this host yields its contiguous share of each step.
    on_bad_record: called once for each bad record.

  `next` raises DataError when more than the configured share of the records
  turns out to be bad.
  """

  def __init__(
    self,
    rows: RowMaker,
    global_batch_size: int,
    *,
    host_index: int = 0,
    host_count: int = 1,
    on_bad_record: OnBadRecord | None = None,
  ):
    self._rows = rows
    self._global_batch_size = global_batch_size
    self._host = (host_index, host_count)
    self._on_bad_record = on_bad_record
    self._bad: set[int] = set()
    self._step = 0
    self._batches: Iterator | None = None
    size = _host_batch_size(global_batch_size, host_count)
    self._stream = (
      grain.MapDataset.range(len(rows.source))
      .seed(rows.config.seed)
      .shuffle()
      .repeat()
      .random_map(rows)
      .batch(size, drop_remainder=True, batch_fn=stack_rows)
    )

  @property
  def step(self) -> int:
    """How many batches have been taken since the first of the run."""
    return self._step

  @property
  def num_bad_records(self) -> int:
    """Different bad records seen by this iterator."""
    return len(self._bad)

  def __iter__(self) -> "TrainIterator":
    return self

  def __next__(self) -> Batch:
    if self._batches is None:
      index, count = self._host
      start = self._step * count + index
      self._batches = _start(self._stream[start::count], self._rows.config)
    batch, bad = next(self._batches)
    _report(bad, self._bad, self._on_bad_record)
    self._refuse_too_many(bad)
    self._step += 1
    return batch

  def _refuse_too_many(self, bad: list[tuple[int, str]]) -> None:
    total, share = len(self._rows.source), self._rows.config.max_bad_share
    if bad and len(self._bad) > share * total:
      raise DataError(
        f"at least {len(self._bad)} of {total} records are bad, more than the "
        f"share data.max_bad_share={share}; the last one: {bad[-1][1]}"
      )

  def state(self) -> dict[str, Any]:
    """What to save: JSON-ready, the same on every host."""
    return {
      "next_index": self._step * self._global_batch_size,
      "seed": self._rows.config.seed,
      "fingerprint": self._fingerprint,
    }

  def set_state(self, state: dict[str, Any], *, force: bool = False) -> None:
    """Goes on from a saved state, with any number of hosts and workers.

    Args:
      state: from `state`.
      force: accept a state of other data.

    Raises:
      DataError: the state belongs to other data, another configuration or
        another global batch size.
    """
    if state["fingerprint"] != self._fingerprint and not force:
      raise DataError(
        "the saved data state belongs to other data, data settings or "
        "global_batch_size; go on with those of the run, or force it."
      )
    self.close()
    self._step = state["next_index"] // self._global_batch_size

  def close(self) -> None:
    """Stops workers; the next batch starts them again."""
    batches, self._batches = self._batches, None
    if batches is not None:
      batches.close()

  @property
  def _fingerprint(self) -> str:
    return f"{self._rows.fingerprint}-{self._global_batch_size}"


def eval_batches(
  rows: RowMaker,
  global_batch_size: int,
  *,
  host_index: int = 0,
  host_count: int = 1,
  on_bad_record: OnBadRecord | None = None,
) -> Iterator[Batch]:
  """Every record once, in order; missing rows of the last batch have weight 0.

  All hosts yield the same number of batches.
  """
  size = _host_batch_size(global_batch_size, host_count)
  steps = -(-len(rows.source) // global_batch_size)
  stream = (
    grain.MapDataset.range(steps * global_batch_size)
    .map(rows)
    .batch(size, batch_fn=stack_rows)
  )
  batches = _start(stream[host_index::host_count], rows.config)
  seen: set[int] = set()
  try:
    for batch, bad in batches:
      _report(bad, seen, on_bad_record)
      yield batch
  finally:
    batches.close()


def num_eval_batches(rows: RowMaker, global_batch_size: int) -> int:
  """How many batches `eval_batches` yields."""
  return -(-len(rows.source) // global_batch_size)


def _host_batch_size(global_batch_size: int, host_count: int) -> int:
  if global_batch_size % host_count:
    raise DataError(
      f"global_batch_size {global_batch_size} does not divide over "
      f"{host_count} hosts."
    )
  return global_batch_size // host_count


def _start(stream: grain.MapDataset, config: DataConfig) -> Iterator:
  """Starts threads or processes that make batches in advance."""
  threads = 0 if config.prefetch == 0 else config.threads
  dataset = stream.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
  )
  if config.workers:
    if not flags.FLAGS.is_parsed():  # grain reads flags in its workers.
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=config.workers,
        per_worker_buffer_size=max(config.prefetch // config.workers, 1),
      )
    )
  return iter(dataset)


def _report(
  bad: list[tuple[int, str]],
  seen: set[int],
  on_bad_record: OnBadRecord | None,
) -> None:
  for index, message in bad:
    if index not in seen:
      seen.add(index)
      if on_bad_record is not None:
        on_bad_record(index, message)
