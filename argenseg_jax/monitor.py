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
    self._end_line()
    try:
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"))
    except Exception as error:  # Whatever is wrong with it, training goes on.
      self._warn(error)

  def _end_line(self) -> None:
    """A kill may have cut the last line off: it must not spoil the next."""
    try:
      with self._path.open("rb+") as file:
        if file.seek(0, 2) and file.seek(-1, 2) + 1 and file.read(1) != b"\n":
          file.write(b"\n")
    except FileNotFoundError:
      pass
    except OSError as error:
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
    except Exception as error:  # TensorBoard's writer raises all kinds.
      self._warn(error)

  def _warn(self, error: Exception) -> None:
    if not self._warned:
      print(f"metrics are not written: {error}", file=sys.stderr)
      self._warned = True

  def close(self) -> None:
    if self._board is not None:
      try:
        self._board.close()
      except Exception as error:
        self._warn(error)


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
