"""Metrics for Weights & Biases."""

import os
import pathlib
from collections.abc import Mapping

from argenseg_jax.config import TrackingConfig
from argenseg_jax.runtime.tracker import About, Tracker


class WeightsAndBiases(Tracker):
  """A run of Weights & Biases, in the folder `wandb`.

  Offline, the default, it calls no network; `wandb sync` sends what it wrote.
  A run that resumes is another one there, in the same group.
  """

  title = "Weights & Biases"

  def __init__(
    self,
    logs: pathlib.Path,
    start: int | None,
    settings: TrackingConfig,
    about: About,
  ):
    if settings.wandb_mode == "offline":  # It would report its own errors.
      os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    self._run = wandb.init(
      project=settings.wandb_project,
      name=f"{about.name} from step {start or 0}",
      group=about.name,
      config=dict(about.config),
      dir=str(logs),
      mode=settings.wandb_mode,
      # What the terminal shows and code are none of its business.
      settings=wandb.Settings(console="off", save_code=False, disable_git=True),
    )
    # Its own count of steps only rises.
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"step": step, **values})

  def close(self) -> None:
    self._run.finish()
