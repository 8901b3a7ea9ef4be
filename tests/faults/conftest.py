"""A work directory with two steps."""

import shutil

import jax.numpy as jnp
import pytest
from faults import damaging

from argenseg_jax.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A work directory with steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(workdir, keep=3)
  for step in (1, 2):
    value = damaging.state(float(step))
    checkpoints.save(step, value, (jnp.zeros(2),), {"step": step})
  checkpoints.wait()
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"
