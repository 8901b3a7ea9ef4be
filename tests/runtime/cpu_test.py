import os

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


def test_a_device_count_that_is_set_stays():
  c = tiny.get_config()
  c.data.path = "somewhere"
  assert jax.config.jax_num_cpu_devices == 8
  cpu.use_all_cores(run_config(c))
  assert jax.config.jax_num_cpu_devices == 8
