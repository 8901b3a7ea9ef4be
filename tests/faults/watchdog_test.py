"""A step that stalls gets its stacks written; seconds are told apart."""

import json
import time

import pytest

from argenseg_jax.runtime.goodput import Goodput
from argenseg_jax.runtime.watchdog import Watchdog


def _until(condition):
  for _ in range(500):
    if condition():
      return
    time.sleep(0.02)
  raise AssertionError("it never came")


def test_a_stalled_step_is_reported_once_with_stacks(tmp_path, capsys):
  watchdog = Watchdog(tmp_path, factor=2.0, least=0.05, every=0.01)
  stacks = tmp_path / "stacks.txt"
  for step in range(8):
    watchdog.beat(step)
  with watchdog.paused():  # An evaluation is no step.
    time.sleep(0.2)
  assert not stacks.exists()
  _until(stacks.exists)
  _until(lambda: "test_a_stalled_step" in stacks.read_text())
  time.sleep(0.1)
  watchdog.close()
  assert "step 8 has taken" in capsys.readouterr().err
  assert stacks.read_text().count("step 8 has taken") == 1
  heartbeat = json.loads((tmp_path / "heartbeat.json").read_text())
  assert heartbeat["step"] == -1 or heartbeat["step"] == 7


def test_seconds_of_a_run_are_told_apart():
  now = iter([0.0, 4.0, 4.0, 5.0, 6.0, 9.0, 10.0])
  goodput = Goodput(clock=lambda: next(now))
  goodput.started()
  with goodput.spent("data"):
    pass
  with pytest.raises(OSError), goodput.spent("save"):  # noqa: PT011
    raise OSError
  values = goodput()
  assert values["seconds/restart"] == 4.0
  assert values["seconds/data"] == 1.0
  assert values["seconds/save"] == 3.0
  assert values["seconds/compile"] == 0.0
  assert values["seconds/productive"] == 2.0
  assert values["goodput"] == pytest.approx(0.2)
