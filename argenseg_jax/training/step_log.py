"""What a run says of its steps: metrics files, progress, skipped steps, and
the masks of its last validation."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from argenseg_jax.config import TrainConfig
from argenseg_jax.evaluation.evaluator import SplitResults, headline
from argenseg_jax.runtime.goodput import Goodput
from argenseg_jax.runtime.host_times import HostTimes
from argenseg_jax.runtime.metric_writer import MetricsWriter, Progress
from argenseg_jax.runtime.nan_guard import NonFinite
from argenseg_jax.runtime.paths import Path
from argenseg_jax.runtime.throughput import Pace

_MASKS = "validation.png"


class StepLog:
  """Metrics of a step are fetched while the next one runs, so that the device
  never waits for the log.

  Args:
    title: of the progress bar.
    train: how often to log, and how many skipped steps end the run.
    folder: gets non_finite.jsonl and validation.png.
    workdir: where people find what is in `folder`.
    writer: of metrics.
    pace: speed between two steps that are logged.
    goodput: seconds by kind.
    start: step that training starts from.
    active: whether this process writes.
  """

  def __init__(
    self,
    title: str,
    train: TrainConfig,
    folder: pathlib.Path,
    *,
    workdir: Path,
    writer: MetricsWriter,
    pace: Pace,
    goodput: Goodput,
    start: int,
    active: bool,
  ):
    self._title, self._active = title, active
    self._folder, self._workdir = folder, workdir
    self._every = train.log_every
    self._pace = pace
    self._hosts = HostTimes(title, goodput, start)
    self._writer = writer
    self._bar = Progress(title, train.steps, start=start, active=active)
    self._guard = NonFinite(
      folder / "non_finite.jsonl", train.max_skipped, active=active
    )
    self._due: tuple[int, dict[str, Any]] | None = None
    self._last = train.steps
    self._note = ""  # What the bar says of the last step that was logged,
    self._score = ""  # and of the last validation.

  def dispatched(self, step: int, metrics: dict[str, Any]) -> None:
    """Notes a step that the device works on; logs the one before if it is due.

    Args:
      step: counted from 1.
      metrics: on their way from the device.

    Raises:
      Diverged: too many steps in a row were skipped.
    """
    self._guard.note(step, metrics.pop("verdict"))
    self._write_due()
    if self._every and (step % self._every == 0 or step == self._last):
      self._due = step, metrics

  def evaluated(self, step: int, split: str, results: SplitResults) -> None:
    """Logs the metrics of a split, and draws the first of its masks."""
    values = results.metrics
    self._writer.write(step, {f"{split}/{k}": v for k, v in values.items()})
    if not self._active:
      return
    self._score = f"{split} {headline(values)}"
    self._show(step)
    line = f"{self._title}, step {step}: {self._score}"
    if self._draw(results):
      line += f"; its masks: {self._workdir / _MASKS}"
    print(line, flush=True)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Something else than steps runs; the time that it takes is no step's."""
    yield
    self._pace.pause()

  def finish(self, step: int) -> None:
    """Waits for the last step.

    Raises:
      Diverged: as `dispatched`.
    """
    self._write_due()
    self._guard.check(step)
    self._show(step)
    self._bar.close()

  def results(self, step: int, values: dict[str, float]) -> None:
    """Logs what a finished run is worth."""
    self._writer.write(step, {f"final/{k}": v for k, v in values.items()})

  def _write_due(self) -> None:
    if self._due is None:
      return
    (step, metrics), self._due = self._due, None
    with self._hosts.waits():
      self._guard.check(step)
      values = _as_floats(jax.device_get(metrics))
    values["skipped"] = self._guard.skipped
    self._writer.write(step, values | self._pace(step) | self._hosts(step))
    shown = "reward" if "reward" in values else "loss"
    self._note = f"{shown} {values[shown]:.3f}"
    self._show(step)

  def _show(self, step: int) -> None:
    self._bar.update(step, ", ".join(filter(None, (self._note, self._score))))

  def _draw(self, results: SplitResults) -> bool:
    """Whether there was anything to draw, and it was written."""
    from argenseg_jax.evaluation import report  # It takes a second to import.

    try:
      return report.draw_first(results, self._folder / _MASKS)
    except Exception as error:  # A run is worth more than its images.
      print(f"{_MASKS} is not written: {error}", file=sys.stderr, flush=True)
      return False


def _as_floats(metrics: dict[str, np.ndarray]) -> dict[str, float]:
  """Numbers of a line; a vector gets a name for each of its entries."""
  values = {}
  for name, value in metrics.items():
    if np.ndim(value):
      values |= {f"{name}/{i}": float(v) for i, v in enumerate(value)}
    else:
      values[name] = float(value)
  return values
