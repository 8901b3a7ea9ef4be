"""Metrics for Weights & Biases."""

import os
from collections.abc import Mapping

from argenseg_jax.runtime.tracker import Tracked, Tracker


class WeightsAndBiases(Tracker):
  """A run of Weights & Biases, in the folder `wandb`.

  Offline, the default, it calls no network; `wandb sync` sends what it wrote.
  A run that resumes is another one there, in the same group.
  """

  title = "Weights & Biases"

  def __init__(self, run: Tracked):
    settings = run.settings
    if settings.wandb_mode == "offline":  # It would report its own errors.
      os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    self._run = wandb.init(
      project=settings.wandb_project,
      name=f"{run.name} from step {run.start or 0}",
      group=run.name,
      config=dict(run.config),
      dir=str(run.logs),
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
