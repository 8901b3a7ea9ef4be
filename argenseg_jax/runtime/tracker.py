"""What a place for metrics must do; one file for each implements it."""

import abc
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from argenseg_jax.config import TrackingConfig


class About(NamedTuple):
  """What a tracker says of a run beside its metrics."""

  name: str
  config: Mapping[str, Any]  # JSON-ready.


class Tracker(abc.ABC):
  """A place that metrics go to; whatever it raises, training goes on.

  Args:
    logs: folder of a task's logs, on a disk.
    start: the step that the run begins with; None: not said.
    settings: of the config.
    about: the run.
  """

  title: str  # For people.

  @abc.abstractmethod
  def __init__(
    self,
    logs: pathlib.Path,
    start: int | None,
    settings: TrackingConfig,
    about: About,
  ): ...

  @abc.abstractmethod
  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records `values` at `step`."""

  @abc.abstractmethod
  def close(self) -> None:
    """No more metrics come."""
