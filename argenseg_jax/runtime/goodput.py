"""Where the seconds of a run went."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

KINDS = ("restart", "compile", "data", "save", "evaluation", "profile")


class Goodput:
  """Adds up seconds by kind; what is of no kind was productive.

  "restart" is everything before the first step: building the model, reading a
  checkpoint. "save" is what a save keeps the run waiting, "data" the wait for
  a batch, "compile" the first step of each program, "profile" the writing of
  a trace. Traces show them by these names.

  Args:
    clock: gives seconds.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._began = clock()
    self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)

  def started(self) -> None:
    """The first step is next."""
    self._seconds["restart"] = self._clock() - self._began

  @contextlib.contextmanager
  def spent(self, kind: str) -> Iterator[None]:
    """Counts the time within it as one of `KINDS`."""
    before = self._clock()
    try:
      with jax.profiler.TraceAnnotation(kind):
        yield
    finally:
      self._seconds[kind] += self._clock() - before

  def __call__(self) -> dict[str, float]:
    """Seconds of each kind so far, and the productive share."""
    total = self._clock() - self._began
    productive = total - sum(self._seconds.values())
    values = {f"seconds/{k}": v for k, v in self._seconds.items()}
    values["seconds/productive"] = productive
    return values | {"goodput": productive / total if total else 0.0}
