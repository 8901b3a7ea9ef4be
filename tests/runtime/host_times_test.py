"""What a host's steps cost it, and which host is slowest."""

import time

import pytest

from argenseg_jax.runtime import distributed, host_times
from argenseg_jax.runtime.goodput import Goodput


@pytest.fixture
def clock(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  return now


def test_hosts_are_compared_by_their_own_work(clock, monkeypatch):
  """Each step takes all of them 10 s; this one waits for 6 s of them."""
  noted = []

  def meet(name, own):
    noted.append(own)
    return {0: own, 3: own | {"own_seconds": 9.0, "data_wait": 0.5}}

  monkeypatch.setattr(distributed, "is_several", lambda: True)
  monkeypatch.setattr(distributed, "noted_by_all", meet)
  goodput = Goodput(lambda: clock[0])
  hosts = host_times.HostTimes("train", goodput, start=4)
  with goodput.spent("compile"):
    clock[0] += 100.0
  for _ in range(2):
    with goodput.spent("data"):
      clock[0] += 1.0
    clock[0] += 3.0
    with hosts.waits():
      clock[0] += 6.0
  found = hosts(6)
  assert noted[0]["step_seconds"] == 10.0
  assert noted[0]["own_seconds"] == 4.0
  assert found["data_wait"] == 0.1
  assert found["seconds/compile"] == 100.0
  assert found["goodput"] == pytest.approx(18 / 120)
  assert found["hosts/slowest"] == 3
  assert found["hosts/own_seconds_min"] == 4.0
  assert found["hosts/own_seconds_max"] == 9.0
  assert found["hosts/data_wait_max"] == 0.5
  assert found["hosts/memory/host_peak_gib_min"] > 0
  clock[0] += 5.0  # The next interval begins anew.
  hosts(7)
  assert noted[1]["step_seconds"] == noted[1]["own_seconds"] == 5.0
  assert noted[1]["data_wait"] == 0.0


def test_a_single_host_is_not_compared():
  found = host_times.HostTimes("train", Goodput(), start=0)(1)
  assert not [name for name in found if name.startswith("hosts/")]
  assert found["data_wait"] == 0.0
  assert found["memory/host_peak_gib"] > 0
