"""Step time, tokens and FLOPs a second, MFU where the peak is published."""

import time
import types

import numpy as np
import pytest

from argenseg_jax.kernels.chips import CHIPS
from argenseg_jax.runtime import throughput


def test_pace_leaves_out_compilation_and_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  device = types.SimpleNamespace(device_kind="TPU v5p")
  mesh = types.SimpleNamespace(devices=np.asarray([device] * 64), size=64)
  pace = throughput.Pace(flops=6e15, tokens=4096, mesh=mesh, start=0)
  now[0] = 100.0
  assert pace(10) == {}
  now[0] = 150.0
  found = pace(20)
  assert found["step_seconds"] == 5.0
  assert found["tokens_per_second"] == 4096 / 5
  assert found["model_tflops_per_second"] == pytest.approx(6e15 / 5e12)
  peak = 64 * CHIPS["v5p"].flops
  assert found["mfu"] == pytest.approx(6e15 / 5 / peak)
  pace.pause()
  now[0] = 999.0
  assert pace(30) == {}
  device.device_kind = "cpu"
  pace = throughput.Pace(flops=6e15, tokens=4096, mesh=mesh, start=0)
  pace(1)
  now[0] += 1
  assert "mfu" not in pace(2)
