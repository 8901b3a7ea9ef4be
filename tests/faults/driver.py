"""`argenseg` with faults: python driver.py FAULT:STEP,... COMMAND ...

term and kill send that signal to this process when the metrics of a step are
noted; nan gives the step's rows a weight that is no number; slow makes a step
take seconds longer, as real ones do: JAX looks for a signal once a second.
"""

import os
import signal
import sys
import time

import numpy as np

from argenseg_jax import non_finite
from argenseg_jax.data import pipeline
from argenseg_jax.tools import cli

_LONGER = 3.0  # Seconds.
_SIGNALS = {"term": signal.SIGTERM, "kill": signal.SIGKILL}


def _inject(faults: dict[int, str]) -> None:
  note, following = non_finite.NonFinite.note, pipeline.TrainIterator.__next__

  def noted(self, step, *rest):
    note(self, step, *rest)
    if faults.get(step) in _SIGNALS:
      os.kill(os.getpid(), _SIGNALS[faults[step]])
    if faults.get(step) == "slow":
      time.sleep(_LONGER)

  def spoilt(self):
    batch = following(self)
    if faults.get(self.step) == "nan":
      weight = np.full_like(batch.sample_weight, np.nan)
      batch = batch._replace(sample_weight=weight)
    return batch

  non_finite.NonFinite.note = noted
  pipeline.TrainIterator.__next__ = spoilt


if __name__ == "__main__":
  given = [f.split(":") for f in sys.argv[1].split(",") if f]
  _inject({int(step): kind for kind, step in given})
  sys.exit(cli.main(sys.argv[2:]))
