import os
from types import SimpleNamespace

import jax
import pytest

from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.runtime import cpu


@pytest.mark.parametrize(
  ("cores", "batches", "devices"),
  [
    (1, (16,), 1),
    (2, (16, 32), 2),
    (3, (16,), 2),
    (6, (16,), 4),
    (64, (16,), 8),
    (8, (12,), 4),
    (8, (16, 5), 1),
  ],
)
def test_devices_divide_every_batch(monkeypatch, cores, batches, devices):
  monkeypatch.setattr(
    os, "sched_getaffinity", lambda _: range(cores), raising=False
  )
  assert cpu.num_devices(*batches) == devices


@pytest.mark.parametrize(
  ("is_set", "data", "updates"),
  [
    (-1, -1, [("jax_num_cpu_devices", 2)]),
    (8, -1, []),  # The user's choice.
    (-1, 2, []),  # A mesh of fixed size.
  ],
)
def test_devices_are_made_where_nobody_has_chosen(
  monkeypatch, is_set, data, updates
):
  c = tiny.get_config()
  c.data.path = "somewhere"
  c.mesh.data = data
  config, made = run_config(c), []
  monkeypatch.setattr(cpu, "num_devices", lambda *_: 2)
  monkeypatch.setattr(
    jax,
    "config",
    SimpleNamespace(
      jax_num_cpu_devices=is_set,
      values={"jax_num_cpu_devices": is_set},
      update=lambda *update: made.append(update),
    ),
  )
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  cpu.use_all_cores(config)
  assert made == updates
