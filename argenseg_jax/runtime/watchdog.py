"""Says so, with every thread's stack, when a step takes far too long."""

import collections
import contextlib
import faulthandler
import json
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator

from argenseg_jax.runtime import paths

_RECENT = 64  # Steps that the median is of.
_FEWEST = 5  # Steps before which there is none.
_HEARTBEAT = 10.0  # Seconds between two notes of the last step.


class Watchdog:
  """Watches the time between steps from a thread of its own.

  Writes `heartbeat.json` ({"step", "at": seconds since 1970}) for watchers
  outside, and appends stacks to `stacks.txt` once for each step that stalls.

  Args:
    workdir: gets both files, named after the process if there are several.
    factor: a step stalls when it takes this many times the median; 0 never.
    process: number of this process.
    least: seconds that a step may always take.
    every: seconds between looks.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    factor: float,
    process: int = 0,
    least: float = 60.0,
    every: float = 1.0,
  ):
    tail = f"-{process}" if process else ""
    self._stacks = workdir / f"stacks{tail}.txt"
    self._heartbeat = workdir / f"heartbeat{tail}.json"
    self._factor, self._least, self._every = factor, least, every
    self._seconds = collections.deque(maxlen=_RECENT)
    self._step, self._since = -1, None
    self._reported, self._noted = -1, 0.0
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="watchdog", daemon=True
    )
    self._thread.start()

  def beat(self, step: int) -> None:
    """A step has ended."""
    now = time.monotonic()
    if self._since is not None:
      self._seconds.append(now - self._since)
    self._step, self._since = step, now

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Something else than a step runs."""
    self._since = None
    try:
      yield
    finally:
      self._since = time.monotonic()

  def close(self) -> None:
    self._closed.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._closed.wait(self._every):
      try:
        self._look(time.monotonic())
      except OSError as error:
        print(f"watchdog cannot write: {error}", file=sys.stderr, flush=True)
        return

  def _look(self, now: float) -> None:
    if now - self._noted > _HEARTBEAT:
      self._noted = now
      note = {"step": self._step, "at": time.time()}
      paths.write_whole(self._heartbeat, json.dumps(note), durable=False)
    step, since = self._step, self._since
    if not self._factor or since is None or len(self._seconds) < _FEWEST:
      return
    median = statistics.median(list(self._seconds))
    if step == self._reported or now - since < max(
      self._factor * median, self._least
    ):
      return
    self._reported = step
    said = (
      f"step {step + 1} has taken {now - since:.0f} s, the median is "
      f"{median:.2f} s"
    )
    name = self._stacks.name
    print(
      f"{said}; see {name} in the work directory.", file=sys.stderr, flush=True
    )
    with self._stacks.open("a") as file:
      file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {said}\n")
      file.flush()
      faulthandler.dump_traceback(file)
      file.write("\n")
