"""What a run does about steps whose loss or gradient is NaN or infinite.

The step itself leaves everything as it was (see `training/step`). Here their
batches are named, and too many in a row end the run.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from jaxtyping import Array, Bool, Int


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
    self._waiting: list[tuple[int, Bool[Array, ""], np.ndarray]] = []
    self._in_row = 0
    self.skipped = 0

  def note(
    self, step: int, skipped: Bool[Array, ""], sample_id: Int[np.ndarray, "b"]
  ) -> None:
    """Remembers a step: whether it was skipped, and this host's records."""
    self._waiting.append((step, skipped, sample_id))

  def check(self, last: int) -> None:
    """Waits for the steps noted up to `last`, reports those that were skipped.

    Raises:
      Diverged: `limit` steps in a row were.
    """
    due = [noted for noted in self._waiting if noted[0] <= last]
    self._waiting = self._waiting[len(due) :]
    flags = jax.device_get([skipped for _, skipped, _ in due])
    for (step, _, records), skipped in zip(due, flags, strict=True):
      if not skipped:
        self._in_row = 0
        continue
      self._in_row += 1
      self.skipped += 1
      if self._active:
        self._report(step, records)
      if self._in_row == self._limit:
        raise Diverged(
          f"loss or gradient was not finite in {self._limit} steps in a row, "
          f"the last of them {step}; {self._path.name} in the work directory "
          "names their records. The "
          "weights are those before them: lower the learning rate or mend the "
          "records, and start again."
        )

  def _report(self, step: int, records: np.ndarray) -> None:
    print(
      f"step {step} skipped: its loss or gradient is not finite.",
      file=sys.stderr,
      flush=True,
    )
    line = {"step": step, "records": [int(i) for i in records]}
    try:
      with self._path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    except OSError as error:  # The log is worth less than the run.
      print(f"{line} is not written: {error}", file=sys.stderr, flush=True)
