"""Reads a whole source before a run does: what it holds, what is wrong."""

import collections
import dataclasses
from collections.abc import Callable
from concurrent import futures

import numpy as np

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker


@dataclasses.dataclass
class Counts:
  """What one data set of a source holds, faulty requests left out."""

  requests: int = 0
  masks: int = 0
  cut: int = 0  # Requests that lose words to fit sequence_length.
  longest: int = 0  # Tokens of the longest request with its answer, once cut.
  kinds: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  pictures: set = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Findings:
  """What a source holds by data set, and a sentence for each faulty request."""

  counts: dict[str, Counts]
  faults: list[str]


def check(
  rows: RowMaker,
  *,
  threads: int = 1,
  on_progress: Callable[[int], None] = lambda done: None,
) -> Findings:
  """Makes every row of a source once, with the first wording of each request.

  Args:
    rows: their source should be one for evaluation, which asks for every class
      or object of a picture.
    threads: that decode.
    on_progress: called with how many requests are done.
  """

  def look(index: int):
    try:
      sample = rows.source[index]
    except DataError as error:
      return None, None, str(error)
    row = rows.row(sample)
    return sample, row, row.error

  counts: dict[str, Counts] = {}
  faults = []
  total = len(rows.source)
  with futures.ThreadPoolExecutor(threads) as pool:
    for first in range(0, total, 64 * threads):
      some = range(first, min(first + 64 * threads, total))
      for index, found in zip(some, pool.map(look, some), strict=True):
        sample, row, fault = found
        if fault:
          faults.append(f"record {index}: {fault}")
          continue
        count = counts.setdefault(sample.dataset, Counts())
        count.requests += 1
        count.cut += len(row.cut)
        drawn = np.count_nonzero(row.fields.mask_valid)
        count.masks += drawn - sample.num_past_masks
        tokens = np.count_nonzero(row.fields.segment_ids)
        count.longest = max(count.longest, tokens)
        count.kinds[sample.kind] += 1
        count.pictures.update(sample.image_keys)
      on_progress(some.stop)
  return Findings(counts, faults)
