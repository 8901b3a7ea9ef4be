"""What a place for metrics must do; one file for each implements it."""

import abc
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from argenseg_jax.config import TrackingConfig


class Tracked(NamedTuple):
  """A run, as a tracker sees it beside its metrics.

  Attributes:
    logs: folder of a task's logs, on a disk.
    start: the step that the run begins with; None: not said.
    settings: of the config, for trackers.
    name: of the run and its task.
    config: the whole, JSON-ready.
  """

  logs: pathlib.Path
  start: int | None = None
  settings: TrackingConfig = TrackingConfig()
  name: str = ""
  config: Mapping[str, Any] = {}


class Tracker(abc.ABC):
  """A place that metrics go to; whatever it raises, training goes on."""

  title: str  # For people.

  @abc.abstractmethod
  def __init__(self, run: Tracked): ...

  @abc.abstractmethod
  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records `values` at `step`."""

  @abc.abstractmethod
  def close(self) -> None:
    """No more metrics come."""
