"""Easy batches first, then the whole data."""

from typing import Any

from argenseg_jax.data.pipeline import TrainIterator
from argenseg_jax.types import Batch


class Curriculum:
  """Yields `steps` batches of one iterator, then those of another.

  It is itself an iterator like `TrainIterator`, resumed by its own state. What
  counts are the rows of those batches: a run that goes on with batches of
  another size takes as many easy rows in all.
  """

  def __init__(self, easy: TrainIterator, main: TrainIterator, steps: int):
    self._parts = {"easy": easy, "main": main}
    self._steps = steps
    self._rows = steps * easy.global_batch_size  # That are easy, in all.

  @property
  def num_bad_records(self) -> int:
    return sum(part.num_bad_records for part in self._parts.values())

  @property
  def num_cut_records(self) -> int:
    return sum(part.num_cut_records for part in self._parts.values())

  def __iter__(self) -> "Curriculum":
    return self

  def __next__(self) -> Batch:
    easy = self._parts["easy"]
    if easy.step * easy.global_batch_size < self._rows:
      return next(easy)
    easy.close()
    return next(self._parts["main"])

  def state(self) -> dict[str, Any]:
    easy = {"steps": self._steps, "rows": self._rows}
    states = {name: part.state() for name, part in self._parts.items()}
    return states | {"warmup": easy}

  def set_state(self, state: dict[str, Any], *, force: bool = False) -> None:
    for name, part in self._parts.items():
      part.set_state(state[name], force=force)
    before = state.get("warmup", {})
    if before.get("steps") == self._steps:  # Else its length was changed.
      self._rows = before["rows"]

  def close(self) -> None:
    for part in self._parts.values():
      part.close()
