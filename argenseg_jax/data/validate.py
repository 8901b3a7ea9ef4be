"""Reads a whole source before a run does: what it holds, what is wrong."""

import collections
import dataclasses
from collections.abc import Callable
from concurrent import futures
from typing import NamedTuple

import numpy as np

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import Row, RowMaker
from argenseg_jax.data.sources.sample import Sample

# What is wrong with a question's answer, or "".
Judge = Callable[[Sample], str]


@dataclasses.dataclass
class Counts:
  """What one data set of a source holds, faulty requests left out."""

  requests: int = 0
  masks: int = 0
  cut: int = 0  # Requests that lose words to fit sequence_length.
  longest: int = 0  # Tokens of the longest request with its answer, once cut.
  left_out: int = 0  # Polygon parts with fewer than three points.
  ignores: int = 0  # Masks of which metrics leave pixels out.
  kinds: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  # How masks are stored, with the values found: "two values: 0, 255".
  stored: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  images: set = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Findings:
  """What a source holds by data set, and a sentence for each faulty request."""

  counts: dict[str, Counts]
  faults: list[str]
  notes: tuple[str, ...] = ()


class _Look(NamedTuple):
  """A request that was read without a fault."""

  sample: Sample
  row: Row
  stored: tuple[str, ...] = ()
  left_out: int = 0
  ignores: int = 0


def check(
  rows: RowMaker,
  *,
  threads: int = 1,
  judge: Judge = lambda sample: "",
  on_progress: Callable[[int], None] = lambda done: None,
) -> Findings:
  """Makes every row of a source once, with the first wording of each request.

  Args:
    rows: their source should be one for evaluation, which asks for every class
      or object of an image.
    threads: that decode.
    judge: says what is wrong with the true answer of a request for words.
    on_progress: called with how many requests are done.
  """
  counts: dict[str, Counts] = {}
  faults = []
  total = len(rows.source)
  with futures.ThreadPoolExecutor(threads) as pool:
    for first in range(0, total, 64 * threads):
      some = range(first, min(first + 64 * threads, total))
      looks = pool.map(lambda index: _look(rows, index, judge), some)
      for index, look in zip(some, looks, strict=True):
        if isinstance(look, str):
          faults.append(f"record {index}: {look}")
        else:
          count = counts.setdefault(look.sample.dataset, Counts())
          _add(count, look)
      on_progress(some.stop)
  return Findings(counts, faults, rows.source.notes)


def _look(rows: RowMaker, index: int, judge: Judge) -> _Look | str:
  """A request, or what is wrong with it."""
  try:
    sample = rows.source[index]
    row = rows.row(sample)
    fault = row.error or judge(sample)
    if fault:
      return fault
    new = range(sample.num_past_masks, len(sample.seg_masks))
    if sample.target != "mask":
      return _Look(sample, row)
    readings = [sample.read_mask(sample.seg_masks[i]) for i in new]
    ignores = [sample.load_ignore(i) for i in new]
  except DataError as error:
    return str(error)
  return _Look(
    sample,
    row,
    tuple(": ".join(filter(None, (r.kind, r.found))) for r in readings),
    sum(reading.left_out for reading in readings),
    sum(ignore is not None for ignore in ignores),
  )


def _add(count: Counts, look: _Look) -> None:
  sample, row = look.sample, look.row
  count.requests += 1
  count.cut += len(row.cut)
  drawn = int(np.count_nonzero(row.fields.mask_valid))
  count.masks += drawn - sample.num_past_masks
  tokens = int(np.count_nonzero(row.fields.segment_ids))
  count.longest = max(count.longest, tokens)
  count.left_out += look.left_out
  count.ignores += look.ignores
  count.kinds[sample.kind] += 1
  count.stored.update(look.stored)
  count.images.update(sample.image_keys)
