"""From a source to batches of fixed shapes, in an order that is a pure function
of (seed, step).

Position p of the endless stream (of records, or of `data.pack` records each) is
row p % B of global batch p // B, whatever the number of hosts, processes or
threads; a host makes only its own contiguous
share of each batch. The state of an iterator is therefore one number, and
resuming is exact.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags

from argenseg_jax.config import DataConfig
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker, stack_rows
from argenseg_jax.data.packing import Packer
from argenseg_jax.data.sources.registry import Mixture
from argenseg_jax.types import Batch

# Called once for each bad record with its index and what is wrong with it.
OnBadRecord = Callable[[int, str], None]


class TrainIterator:
  """Endless shuffled batches, each epoch in a new order.

  Args:
    rows: makes rows.
    global_batch_size: rows of a step over all hosts.
    host_index, host_count: this host yields its contiguous share of each step.
    on_bad_record: called once for each bad record.

  `next` raises DataError when more than the configured share of the records
  turns out to be bad, or a worker process dies.
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
    self._cut: set[int] = set()
    self._step = 0
    self._batches: grain.DatasetIterator | None = None
    size = _host_batch_size(global_batch_size, host_count)
    order, make = _order(rows), rows
    if rows.config.pack > 1:
      order = order.batch(rows.config.pack, drop_remainder=True)
      make = Packer(rows)
    self._stream = order.random_map(make).batch(
      size, drop_remainder=True, batch_fn=stack_rows
    )

  @property
  def step(self) -> int:
    """How many batches have been taken since the first of the run."""
    return self._step

  @property
  def global_batch_size(self) -> int:
    return self._global_batch_size

  @property
  def num_bad_records(self) -> int:
    """Different bad records seen by this iterator."""
    return len(self._bad)

  @property
  def num_cut_records(self) -> int:
    """Different records that lost tokens to fit sequence_length."""
    return len(self._cut)

  def __iter__(self) -> "TrainIterator":
    return self

  def __next__(self) -> Batch:
    if self._batches is None:
      index, count = self._host
      start = self._step * count + index
      self._batches = _start(self._stream[start::count], self._rows.config)
    with _dead_workers_named():
      batch, remarks = next(self._batches)
    _report(remarks.bad, self._bad, self._on_bad_record)
    self._refuse_too_many(remarks.bad)
    self._cut.update(remarks.cut)
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
      "content": self._content,
    }

  def set_state(self, state: dict[str, Any], *, force: bool = False) -> None:
    """Resumes from a saved state, with any number of hosts and workers.

    Args:
      state: from `state`.
      force: accept a state of other data.

    Raises:
      DataError: the state belongs to other data, another configuration or
        another global batch size.
    """
    if state["fingerprint"] != self._fingerprint and not force:
      before = state.get("content") or {}
      other = [k for k, v in self._content.items() if before.get(k) != v]
      if not before:  # Of an earlier version.
        other = ["data, data settings or global_batch_size"]
      raise DataError(
        f"the saved data state belongs to other {', '.join(other)}; resume "
        "with those of the run, or accept the change with "
        "--accept_changed_data."
      )
    self.close()
    self._step = state["next_index"] // self._global_batch_size

  def close(self) -> None:
    """Stops workers; the next batch starts them again."""
    batches, self._batches = self._batches, None
    if batches is not None:
      batches.close()

  @functools.cached_property
  def _content(self) -> dict[str, Any]:
    found = self._rows.content
    settings = found.pop("data settings")
    found |= {f"data.{key}": value for key, value in settings.items()}
    found["global_batch_size"] = self._global_batch_size
    return json.loads(json.dumps(found))  # As a checkpoint gives it back.

  @functools.cached_property
  def _fingerprint(self) -> str:
    return f"{self._rows.fingerprint}-{self._global_batch_size}"


def _order(rows: RowMaker) -> grain.MapDataset:
  """Indices of records for ever: each epoch of each source in a new order, a
  mixture's sources in turn by their weights."""
  seed, source = rows.config.seed, rows.source
  if not isinstance(source, Mixture):
    whole = grain.MapDataset.range(len(source))
    return whole.seed(seed).shuffle().repeat()
  parts = [
    grain.MapDataset.range(start, stop).seed(seed + n).shuffle().repeat()
    for n, (start, stop) in enumerate(
      zip(source.offsets[:-1], source.offsets[1:], strict=True)
    )
  ]
  return grain.MapDataset.mix(parts, source.weights).seed(seed)


def eval_batches(
  rows: RowMaker,
  global_batch_size: int,
  *,
  host_index: int = 0,
  host_count: int = 1,
  first: int = 0,
  on_bad_record: OnBadRecord | None = None,
) -> Iterator[Batch]:
  """Every record once, in order; missing rows of the last batch have weight 0.

  All hosts yield the same number of batches. The first `first` of them are
  left out.
  """
  size = _host_batch_size(global_batch_size, host_count)
  steps = -(-len(rows.source) // global_batch_size)
  stream = (
    grain.MapDataset.range(steps * global_batch_size)
    .map(rows)
    .batch(size, batch_fn=stack_rows)
  )
  stream = stream[first * host_count + host_index :: host_count]
  batches = _start(stream, rows.config)
  seen: set[int] = set()
  try:
    for _ in range(first, steps):
      with _dead_workers_named():
        batch, remarks = next(batches)
      _report(remarks.bad, seen, on_bad_record)
      yield batch
  finally:
    batches.close()


def _host_batch_size(global_batch_size: int, host_count: int) -> int:
  if global_batch_size % host_count:
    raise DataError(
      f"global_batch_size {global_batch_size} does not divide over "
      f"{host_count} hosts."
    )
  return global_batch_size // host_count


def _start(
  stream: grain.MapDataset, config: DataConfig
) -> grain.DatasetIterator:
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


@contextlib.contextmanager
def _dead_workers_named():
  """Turns grain's error for a process that is gone into ours."""
  try:
    yield
  except RuntimeError as error:
    if "Worker process" not in str(error):
      raise
    raise DataError(
      "a data worker died, perhaps for lack of memory (grain says: "
      f"{str(error).split('.')[0]}); use fewer data.workers or a smaller "
      "data.prefetch."
    ) from error


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
