"""What a person sees of a run: metrics files and progress."""

import contextlib
import json
import math
import os
import pathlib
import socket
import struct
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import rich.progress

from argenseg_jax.runtime import paths


class MetricsWriter:
  """Appends metrics to `metrics.jsonl` and to TensorBoard event files.

  A number that is NaN or infinite is null in the file, and its name stands
  under "not_finite". What cannot be written is said once and left out: training
  is worth more than its log.

  Args:
    workdir: gets both.
    active: whether this process writes.
    start: the step that a resumed run begins with; lines of later ones, which
      a killed run had written, are taken out.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    active: bool = True,
    start: int | None = None,
  ):
    self._active = active
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._board = None
    self._warned = False
    self._cut = True  # Perhaps: an earlier call may have been killed.
    if not active:
      return
    try:
      if start is not None:
        self._forget_after(start)
    except Exception as error:
      self._warn(error)
    try:
      self._board = _Board(pathlib.Path(workdir) / "tensorboard", start)
    except Exception as error:  # Whatever is wrong with it, training goes on.
      self._warn_of_board(error)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records `values` at `step`."""
    if not self._active:
      return
    try:
      if self._cut:
        self._end_line()
      with self._path.open("a") as file:
        self._cut = True
        file.write(_line(step, values))
      self._cut = False
    except Exception as error:
      self._warn(error)
    if self._board is not None:
      try:
        self._board.write(step, values)
      except Exception as error:  # tensorboardX raises all kinds.
        self._warn_of_board(error)

  def _forget_after(self, start: int) -> None:
    """Takes out the lines of steps that will be taken again."""
    if not self._path.exists():
      return
    lines = self._path.read_text(errors="replace").splitlines()
    kept = [line for line in lines if not _is_after(line, start)]
    if len(kept) < len(lines):
      paths.write_whole(self._path, "".join(f"{line}\n" for line in kept))

  def _end_line(self) -> None:
    """The last line may have been cut off: it must not spoil the next."""
    try:
      with self._path.open("rb+") as file:
        if file.seek(0, 2) and file.seek(-1, 2) + 1 and file.read(1) != b"\n":
          file.write(b"\n")
    except FileNotFoundError:
      pass

  def _warn(self, error: Exception) -> None:
    if not self._warned:
      print(f"metrics are not written: {error}", file=sys.stderr, flush=True)
      self._warned = True

  def _warn_of_board(self, error: Exception) -> None:
    print(f"TensorBoard gets no metrics: {error}", file=sys.stderr, flush=True)
    self._board = None


def _line(step: int, values: Mapping[str, float]) -> str:
  odd = sorted(k for k, v in values.items() if not math.isfinite(v))
  plain = {k: None if k in odd else v for k, v in values.items()}
  flagged = {"not_finite": odd} if odd else {}
  return json.dumps({"step": step, **plain, **flagged}, allow_nan=False) + "\n"


def _is_after(line: str, start: int) -> bool:
  try:
    return json.loads(line)["step"] > start
  except (ValueError, KeyError, TypeError, RecursionError):
    return False  # Not a line of ours: it stays.


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """tensorboardX imports torch if it can: seconds, for nothing."""
  if "torch" in sys.modules:
    yield
    return
  sys.modules["torch"] = cast(types.ModuleType, None)  # Not to be imported.
  try:
    yield
  finally:
    del sys.modules["torch"]


class _Board:
  """TensorBoard's event file.

  tensorboardX writes it from a thread. When that one dies, of a full disk for
  example, its queue fills up and the run waits for ever; so this writes itself.
  """

  def __init__(self, folder: pathlib.Path, start: int | None):
    with _without_torch():
      from tensorboardX import record_writer, summary
      from tensorboardX.proto import event_pb2

    made: Any = event_pb2  # Its classes are made when it is imported.
    self._event, self._scalar = made.Event, summary.scalar
    self._check = record_writer.masked_crc32c
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}"
    self._path = folder / name
    self._append([self._event(wall_time=now, file_version="brain.Event:2")])
    if start is not None:  # Readers drop the steps after it.
      began = made.SessionLog(status=made.SessionLog.START)
      self._append(
        [self._event(wall_time=now, step=start + 1, session_log=began)]
      )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    now = time.time()
    self._append(
      self._event(wall_time=now, step=step, summary=self._scalar(name, value))
      for name, value in values.items()
    )

  def _append(self, events: Iterable[Any]) -> None:
    with self._path.open("ab") as file:
      for event in events:
        data = event.SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):
          file.write(part + struct.pack("<I", self._check(part)))


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
    if active and sys.stdout and sys.stdout.isatty():
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
