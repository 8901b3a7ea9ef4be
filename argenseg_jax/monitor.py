"""What a person sees of a run: metrics files and progress."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping

import rich.progress


class MetricsWriter:
  """Appends metrics to `metrics.jsonl` and to TensorBoard event files.

  A writer that cannot write warns once and goes on: training is worth more
  than its log.
  """

  def __init__(self, workdir: str | pathlib.Path, *, active: bool = True):
    self._active = active
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._board = None
    self._warned = False
    if not active:
      return
    try:
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"))
    except (ImportError, OSError) as error:
      self._warn(error)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records `values` at `step`."""
    if not self._active:
      return
    try:
      with self._path.open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")
      if self._board is not None:
        for name, value in values.items():
          self._board.add_scalar(name, value, step)
    except OSError as error:
      self._warn(error)

  def _warn(self, error: Exception) -> None:
    if not self._warned:
      print(f"metrics are not written: {error}", file=sys.stderr)
      self._warned = True

  def close(self) -> None:
    if self._board is not None:
      self._board.close()


class Progress:
  """A bar with loss, rate and time left; plain lines when not a terminal."""

  def __init__(
    self, title: str, total: int, *, start: int = 0, active: bool = True
  ):
    self._title = title
    self._total = total
    self._start = start
    self._began = time.monotonic()
    self._last_line = 0.0
    self._bar = None
    self._active = active
    if active and sys.stdout.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        rich.progress.TimeRemainingColumn(),
      )
      self._bar.start()
      self._task = self._bar.add_task(
        title, total=total, completed=start, note=""
      )

  def update(self, done: int, note: str = "") -> None:
    """Shows that `done` of the total are done."""
    if not self._active:
      return
    if self._bar is not None:
      self._bar.update(self._task, completed=done, note=note)
      return
    now = time.monotonic()
    if now - self._last_line < 10 and done < self._total:
      return
    self._last_line = now
    rate = (done - self._start) / max(now - self._began, 1e-6)
    left = (self._total - done) / rate if rate else float("inf")
    print(
      f"{self._title} {done}/{self._total} {note} {rate:.1f}/s, "
      f"{left:.0f} s left",
      flush=True,
    )

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()
