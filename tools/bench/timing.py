"""Times of stages, as medians."""

import argparse
import contextlib
import contextvars
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from argenseg_jax.runtime.paths import disk_path

_TRACES: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar(
  "folder of traces", default=None
)
_ENOUGH = 10.0  # Seconds after which a stage is not repeated again.


class Timed(NamedTuple):
  """A stage, how long it took and how long it must take."""

  name: str
  batch: int
  seconds: float
  compile_seconds: float
  bound: float | None = None


def add_profile_option(parser: argparse.ArgumentParser) -> None:
  """`--profile`, for `traces_into`."""
  parser.add_argument(
    "--profile",
    metavar="DIR",
    help="then run each program once more and write a trace of it for XProf",
  )


@contextlib.contextmanager
def traces_into(folder: str | None) -> Iterator[None]:
  """Within it, `trace` writes into a folder; None: it does nothing."""
  path = disk_path(folder) if folder else None
  if path is not None:
    path.mkdir(parents=True, exist_ok=True)
  token = _TRACES.set(path)
  try:
    yield
  finally:
    _TRACES.reset(token)


def trace(name: str, run: Callable[[], Any]) -> None:
  """Runs once more what has been timed, and traces it, if that is asked for."""
  folder = _TRACES.get()
  if folder is None:
    return
  from argenseg_jax.runtime import profile

  with profile.traced(folder, re.sub(r"\W+", "_", name).strip("_")):
    run()


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
  """Median wall seconds of a call, of fewer calls if they are long."""
  seconds: list[float] = []
  while len(seconds) < repeats and sum(seconds) < _ENOUGH:
    began = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - began)
  return sorted(seconds)[len(seconds) // 2]
