"""`argenseg` with faults: python driver.py FAULT:NUMBER,... COMMAND ...

nan gives a step's rows a weight that is no number; kill sends that signal to
this process when a step's metrics are noted. The others send SIGTERM, and what
they send it in lasts until hosts had time to agree, as real steps and saves do:
JAX looks for a signal once a second.

term: when a step's metrics are noted; data: in the wait for a step's batch;
compile: in the first compilation after that batch has come; save: when all
files of a step are written, on the host that then names it; evaluate: in a
batch of an evaluation, counted from 1.
"""

import os
import signal
import sys
import threading
import time

import jax
import numpy as np

from argenseg_jax import checkpoint, sharding
from argenseg_jax.data import pipeline
from argenseg_jax.evaluation import evaluator
from argenseg_jax.runtime import distributed, nan_guard
from argenseg_jax.tools import cli

_AGREE = 3.0  # Seconds that hosts have to agree, once JAX has the signal.
_COMPILES = "/jax/compilation_cache/compile_requests_use_cache"


class _Faults:
  def __init__(self, faults: set[tuple[str, int]]):
    self._faults = faults
    self._step = 0  # The one whose batch came last.
    self._batches = 0  # Of evaluations.
    self._compiles = False
    self._sent = threading.Event()

  def term(self, kind: str, number: int) -> None:
    """SIGTERM, if it is due."""
    if (kind, number) in self._faults:
      print(f"SIGTERM: {kind} {number}", flush=True)
      os.kill(os.getpid(), signal.SIGTERM)
      self._sent.set()
      _let_agree()

  def noted(self, step: int) -> None:
    if ("kill", step) in self._faults:
      os.kill(os.getpid(), signal.SIGKILL)
    self.term("term", step)
    if ("save", step - 1) in self._faults:  # That save is under way.
      self._sent.wait(300)
      _let_agree()

  def batch(self, following):
    def next_batch(batches):
      self.term("data", batches.step + 1)
      batch = following(batches)
      self._step = batches.step
      if ("nan", self._step) in self._faults:
        weight = np.full_like(batch.sample_weight, np.nan)
        batch = batch._replace(sample_weight=weight)
      return batch

    return next_batch

  def put(self) -> None:
    self._compiles = True

  def compiles(self, event: str, **_) -> None:
    if event == _COMPILES and self._compiles:
      self._compiles = False
      self.term("compile", self._step)

  def evaluated(self) -> None:
    self._batches += 1
    self.term("evaluate", self._batches)


def _let_agree() -> None:
  if jax.process_count() == 1:
    return
  for _ in range(300):
    if distributed.stop_noticed():
      break
    time.sleep(0.2)
  time.sleep(_AGREE)


def _before(owner, name, act):
  original = getattr(owner, name)

  def replaced(*args, **kwargs):
    act(*args)
    return original(*args, **kwargs)

  setattr(owner, name, replaced)


def _inject(faults: _Faults) -> None:
  iterator = pipeline.TrainIterator
  iterator.__next__ = faults.batch(iterator.__next__)
  _before(nan_guard.NonFinite, "note", lambda _, step, *__: faults.noted(step))
  _before(sharding, "put_batch", lambda *_: faults.put())
  _before(evaluator, "left_pad", lambda *_: faults.evaluated())
  _before(
    checkpoint.Checkpoints,
    "_sign",
    lambda checkpoints: faults.term("save", checkpoints._saving),
  )
  jax.monitoring.register_event_listener(faults.compiles)


if __name__ == "__main__":
  given = [f.split(":") for f in sys.argv[1].split(",") if f]
  _inject(_Faults({(kind, int(number)) for kind, number in given}))
  sys.exit(cli.main(sys.argv[2:]))
