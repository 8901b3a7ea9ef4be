"""Times of stages, as medians."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

_ENOUGH = 10.0  # Seconds after which a stage is not repeated again.


class Timed(NamedTuple):
  """A stage, how long it took and how long it must take."""

  name: str
  batch: int
  seconds: float
  compile_seconds: float
  bound: float | None = None


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
  """Median wall seconds of a call, of fewer calls if they are long."""
  seconds: list[float] = []
  while len(seconds) < repeats and sum(seconds) < _ENOUGH:
    began = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - began)
  return sorted(seconds)[len(seconds) // 2]
