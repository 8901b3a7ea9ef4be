"""What a person sees of a run: metrics files and progress."""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Mapping

import rich.progress

from argenseg_jax.config import ConfigError, TrackingConfig
from argenseg_jax.runtime import paths
from argenseg_jax.runtime.tensorboard_tracker import TensorBoard
from argenseg_jax.runtime.tracker import Tracked, Tracker
from argenseg_jax.runtime.wandb_tracker import WeightsAndBiases

# By `tracking.trackers`.
TRACKERS: dict[str, type[Tracker]] = {
  "tensorboard": TensorBoard,
  "wandb": WeightsAndBiases,
}


def require_trackers(settings: TrackingConfig) -> None:
  """Checks that what the config names is installed, before a run begins.

  TensorBoard's package is among the requirements.

  Raises:
    ConfigError: it is not.
  """
  if "wandb" in settings.trackers and importlib.util.find_spec("wandb") is None:
    raise ConfigError(
      "config key 'tracking.trackers' names 'wandb', which is not installed: "
      "pip install wandb."
    )


class MetricsWriter:
  """Appends metrics to `metrics.jsonl`, and gives them to trackers.

  A number that is NaN or infinite is null in the file, and its name stands
  under "not_finite". What cannot be written is said once and left out: training
  is worth more than its log.

  Args:
    run: its logs get the file and what trackers write; lines of steps after
      its start, which a killed run had written, are taken out.
    active: whether this process writes.
  """

  def __init__(self, run: Tracked, *, active: bool = True):
    self._active = active
    self._path = run.logs / "metrics.jsonl"
    self._trackers: dict[str, Tracker] = {}
    self._warned = False
    self._cut = True  # Perhaps: an earlier call may have been killed.
    if not active:
      return
    try:
      if run.start is not None:
        self._forget_after(run.start)
    except Exception as error:
      self._warn(error)
    for name in run.settings.trackers:
      try:
        self._trackers[name] = TRACKERS[name](run)
      except Exception as error:  # Whatever is wrong with it, training goes on.
        self._drop(name, error)

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
    for name, tracker in list(self._trackers.items()):
      try:
        tracker.write(step, values)
      except Exception as error:  # tensorboardX raises all kinds.
        self._drop(name, error)

  def close(self) -> None:
    """Trackers finish what they do."""
    for name, tracker in list(self._trackers.items()):
      try:
        tracker.close()
      except Exception as error:
        self._drop(name, error)

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

  def _drop(self, name: str, error: Exception) -> None:
    self._trackers.pop(name, None)
    print(
      f"{TRACKERS[name].title} gets no metrics: {error}",
      file=sys.stderr,
      flush=True,
    )


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


class Progress:
  """A bar with a note, rate and time left; plain lines when not a terminal.

  The rate is the mean since the first update: what comes before that is mostly
  compilation.

  Args:
    title: what is done.
    total: how much of it there is.
    start: how much of it an earlier call did.
    active: whether this process shows it.
  """

  def __init__(
    self, title: str, total: int, *, start: int = 0, active: bool = True
  ):
    self._title = title
    self._total = total
    self._began = time.monotonic()
    self._first: tuple[float, int] | None = None  # Update: time and done.
    self._last_line = (0.0, -1)  # Likewise.
    self._bar = None
    self._active = active
    if active and sys.stdout and sys.stdout.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
      )
      self._bar.start()
      self._task = self._bar.add_task(
        title, total=total, completed=start, note=""
      )

  def update(self, done: int, note: str = "") -> None:
    """Shows that `done` of the total are done."""
    if not self._active:
      return
    now = time.monotonic()
    self._first = self._first or (now, done)
    note = ", ".join(filter(None, (note, self._speed(now, done))))
    if self._bar is not None:
      self._bar.update(self._task, completed=done, note=note)
      return
    shown_at, shown = self._last_line
    if done == shown or (now - shown_at < 10 and done < self._total):
      return
    self._last_line = now, done
    print(f"{self._title} {done}/{self._total} {note}", flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()

  def _speed(self, now: float, done: int) -> str:
    """Rate and time left; at the end, the time that it took."""
    if done >= self._total:
      return f"took {duration(now - self._began)}"
    began, first = self._first or (now, done)
    if done <= first or now <= began:
      return ""
    each = (now - began) / (done - first)
    rate = f"{1 / each:.1f}/s" if each <= 1 else f"{each:.1f} s each"
    return f"{rate}, {duration(each * (self._total - done))} left"


def duration(seconds: float) -> str:
  """How long something takes, as one says it."""
  if seconds < 99.5:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  if minutes < 100:
    return f"{minutes} min"
  return f"{minutes // 60} h {minutes % 60:02d} min"
