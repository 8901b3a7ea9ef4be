"""What a run does about steps that give NaN or infinite numbers.

A step whose loss, gradient or update is not finite leaves everything as it was
(see `training/step`). Here its records are named; too many such steps in a row
end the run.
"""

import json
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int


class Verdict(NamedTuple):
  """What a step says of itself, the same on every host."""

  skipped: Bool[Array, ""]  # Nothing but the step count changed.
  update_only: Bool[Array, ""]  # Loss and gradient were finite.
  # Those whose part of the batch had the NaN; -1 for all others.
  records: Int[Array, "b"]


class Diverged(Exception):
  """Too many steps in a row were not finite."""


class NonFinite:
  """Collects each step's verdict without waiting for the device.

  Args:
    path: jsonl file that gets a line for each skipped step.
    limit: steps in a row that end the run; 0 never does.
    active: whether this process writes.
  """

  def __init__(self, path: pathlib.Path, limit: int, *, active: bool = True):
    self._path = path
    self._limit = limit
    self._active = active
    self._waiting: list[tuple[int, Verdict]] = []
    self._in_row = 0
    self.skipped = 0

  def note(self, step: int, verdict: Verdict) -> None:
    """Remembers a step, whose verdict may still be on its way."""
    self._waiting.append((step, verdict))

  def check(self, last: int) -> None:
    """Waits for the steps noted up to `last`, reports those that were skipped.

    Raises:
      Diverged: `limit` steps in a row were.
    """
    due = [noted for noted in self._waiting if noted[0] <= last]
    self._waiting = self._waiting[len(due) :]
    flags = jax.device_get([verdict.skipped for _, verdict in due])
    for (step, verdict), skipped in zip(due, flags, strict=True):
      if not skipped:
        self._in_row = 0
        continue
      self._in_row += 1
      self.skipped += 1
      verdict = jax.device_get(verdict)
      what = "update" if verdict.update_only else "loss or gradient"
      if self._active:
        self._report(step, what, verdict.records)
      if self._in_row == self._limit:
        raise Diverged(_advice(step, what, self._limit, self._path.name))

  def _report(self, step: int, what: str, records: np.ndarray) -> None:
    print(
      f"step {step} skipped: its {what} is not finite.",
      file=sys.stderr,
      flush=True,
    )
    named = sorted({int(i) for i in records if i >= 0})
    line = {"step": step, "not_finite": what, "records": named}
    try:
      with self._path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    except OSError as error:  # The log is worth less than the run.
      print(f"{line} is not written: {error}", file=sys.stderr, flush=True)


def _advice(step: int, what: str, limit: int, log: str) -> str:
  remedy = (
    f"fix the records that {log} in the work directory names, or lower the "
    "learning rate"
  )
  if what == "update":
    remedy = "raise optimizer.eps or lower the learning rate"
  return (
    f"the {what} was not finite in {limit} steps in a row, the last of them "
    f"{step}. The last checkpoint is from before those steps: {remedy} (add "
    "--change_settings), then rerun the same command."
  )
