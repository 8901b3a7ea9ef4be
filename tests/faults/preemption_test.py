"""SIGTERM at any moment: a complete checkpoint, and nothing changes."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.experimental import multihost_utils
from tiny_run import both_tasks, losses

from argenseg_jax import checkpoint, sharding
from argenseg_jax.checkpoint import manifest
from argenseg_jax.data import pipeline
from argenseg_jax.evaluation import evaluator
from argenseg_jax.runtime import preemption
from argenseg_jax.training import loop


@pytest.fixture(scope="module", autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return both_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture
def _compiled_once(tmp_path):
  """Later runs of a test find what the first one compiled."""
  names = {
    "jax_compilation_cache_dir": str(tmp_path / "cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in names.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def _told():
  os.kill(os.getpid(), signal.SIGTERM)


def _when(patch, owner, name, condition):
  """SIGTERM before `owner.name` runs, once `condition` holds."""
  original, told = getattr(owner, name), []

  def replaced(*args, **kwargs):
    if not told and condition(*args):
      told.append(True)
      _told()
    return original(*args, **kwargs)

  patch.setattr(owner, name, replaced)


def _everything(workdir, step):
  """Every array of a step: parameters, moments, counters."""
  path = workdir / "checkpoints" / str(step)
  found = {}
  with ocp.StandardCheckpointer() as reader:
    for item in ("model", "optimizer"):
      here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      tree = reader.metadata(path / item).item_metadata.tree
      wanted = jax.tree.map(
        lambda x, here=here: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=here
        ),
        tree,
        is_leaf=lambda x: hasattr(x, "shape"),
      )
      found[item] = reader.restore(path / item, wanted)
  return found


MOMENTS = {
  "data": (
    pipeline.TrainIterator,
    "__next__",
    lambda batches: batches.step == 2,
    2,
  ),
  "evaluation": (evaluator, "left_pad", lambda *_: True, 4),
  "save": (
    checkpoint.Checkpoints,
    "_sign",
    lambda self: self._saving == 6,
    (7, 8),
  ),
  "compilation": (sharding, "put_batch", lambda *_: True, (8, 9)),
}


@pytest.mark.usefixtures("_compiled_once")
@pytest.mark.long
def test_a_run_stopped_everywhere_equals_one_that_was_not(config, tmp_path):
  stage = config.mllm.train
  stage = dataclasses.replace(
    stage, steps=10, eval_every=4, save_every=6, log_every=1, keep=9
  )
  config = dataclasses.replace(
    config,
    mesh=dataclasses.replace(config.mesh, data=-1, fsdp=1),
    mllm=dataclasses.replace(config.mllm, train=stage),
    loss=dataclasses.replace(config.loss, drop_scale_inputs=0.4),
    data=dataclasses.replace(config.data, warmup_steps=0),
  )
  original = signal.getsignal(signal.SIGTERM)
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  loop.train(config, "mllm", whole)
  for owner, name, condition, expected in MOMENTS.values():
    with pytest.MonkeyPatch.context() as patch:
      _when(patch, owner, name, condition)
      with pytest.raises(preemption.Interrupted, match="resumes"):
        loop.train(config, "mllm", stopped)
    steps = [int(p.name) for p in (stopped / "checkpoints").iterdir()]
    assert max(steps) in np.atleast_1d(expected), (name, steps)
    for step in steps:
      assert manifest.faults(stopped / "checkpoints" / str(step)) == ()
    assert signal.getsignal(signal.SIGTERM) == original
  assert not (stopped / "results.json").exists()
  loop.train(config, "mllm", stopped)
  expected, found = losses(whole), losses(stopped)
  assert found.items() <= expected.items()
  jax.tree.map(
    np.testing.assert_array_equal,
    _everything(whole, 10),
    _everything(stopped, 10),
  )


# In the middle of C, as in a compilation: no Python code runs there.
_BUSY = """
import ctypes, os, signal, sys, threading, time
from argenseg_jax.runtime import preemption
def send():
  for number in sys.argv[2:]:
    time.sleep(0.3)
    os.kill(os.getpid(), int(number))
with preemption.listening(float(sys.argv[1])):
  threading.Thread(target=send, daemon=True).start()
  ctypes.CDLL(None).sleep(60)
  ctypes.CDLL(None).sleep(60)
  ctypes.CDLL(None).sleep(60)
"""
_TERM, _INT = str(int(signal.SIGTERM)), str(int(signal.SIGINT))


@pytest.mark.parametrize(
  ("grace", "signals", "code", "said"),
  [
    ("0.3", [_TERM], 3, "SIGTERM came 0.3 s ago"),
    ("0.3", [_INT], 130, "Ctrl-C came 0.3 s ago"),
    ("50", [_INT, _INT], 130, ""),  # The second ends at once.
  ],
)
def test_a_run_that_cannot_stop_ends_within_its_grace_time(
  grace, signals, code, said
):
  done = subprocess.run(
    [sys.executable, "-c", _BUSY, grace, *signals],
    capture_output=True,
    text=True,
    timeout=90,
    check=False,
  )
  assert done.returncode == code, done.stderr
  assert said in done.stderr
  if said:
    assert "resumes from the last complete checkpoint" in done.stderr


def test_ctrl_c_saves_and_has_a_code_of_its_own():
  before = signal.getsignal(signal.SIGINT)
  with preemption.listening(0) as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop.requested()
    with pytest.raises(preemption.Interrupted) as raised:
      stop.check()
  assert raised.value.code == 130
  assert signal.getsignal(signal.SIGINT) == before
  assert preemption.Interrupted("later").code == preemption.INTERRUPTED


def test_saves_do_not_ask_whether_to_stop(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(
    multihost_utils, "reached_preemption_sync_point", asked.append
  )
  checkpoints = checkpoint.Checkpoints(tmp_path)
  value = nnx.State({"kernel": nnx.Param(jnp.zeros(2))})
  checkpoints.save(1, value, None, {})
  checkpoints.wait()
  checkpoints.close()
  assert (tmp_path / "checkpoints" / "1").is_dir()
  assert not asked


def test_other_threads_do_not_listen():
  before, found = signal.getsignal(signal.SIGTERM), []

  def listen():
    with preemption.listening(0) as stop:
      found.append((stop.requested(), signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=listen)
  thread.start()
  thread.join()
  assert found == [(False, before)]


def test_a_listener_within_another_is_the_same():
  with preemption.listening(0) as outer, preemption.listening(0) as inner:
    assert inner is outer
    _told()
    assert inner.requested()
    with pytest.raises(preemption.Interrupted), outer.interruptible():
      raise AssertionError
