"""A full disk ends a run with one sentence; a dead log does not end it."""

import contextlib
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import integrity
from argenseg_jax.checkpoint import CheckpointError, Checkpoints
from argenseg_jax.monitor import MetricsWriter
from argenseg_jax.non_finite import NonFinite


@pytest.fixture
def small_disk(tmp_path):
  """A file system of two megabytes."""
  mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"mounting is not allowed here: {error}")
  yield tmp_path
  subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def _state(size):
  values = np.random.default_rng(0).normal(size=size).astype(np.float32)
  return nnx.State({"kernel": nnx.Param(jnp.asarray(values))})


def test_a_full_disk_is_a_sentence_and_spoils_nothing(small_disk):
  checkpoints = Checkpoints(small_disk, keep=3)
  checkpoints.save(1, _state(64), (jnp.zeros(2),), {})
  checkpoints.wait()
  checkpoints.save(2, _state(1 << 20), (jnp.zeros(2),), {})
  with pytest.raises(
    CheckpointError, match=r"cannot write checkpoint .*/2: No space left on"
  ):
    checkpoints.wait()
  with contextlib.suppress(CheckpointError):
    checkpoints.close()
  assert integrity.faults(small_disk / "checkpoints" / "1") == ()
  again = Checkpoints(small_disk, keep=3)
  assert again.newest_good() == 1
  again.save(2, _state(64), (jnp.zeros(2),), {})
  again.wait()
  again.close()
  assert integrity.faults(small_disk / "checkpoints" / "2") == ()


def test_metrics_that_cannot_be_written_are_said_once(tmp_path, capsys):
  (tmp_path / "metrics.jsonl").mkdir()
  (tmp_path / "tensorboard").write_text("a file")
  writer = MetricsWriter(tmp_path)
  for step in range(3):
    writer.write(step, {"loss": 1.0})
  writer.close()
  assert capsys.readouterr().err.count("metrics are not written") == 1


def test_without_tensorboard_metrics_are_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  writer.close()
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert line == {"step": 1, "loss": 1.0}
  assert "tensorboardX" in capsys.readouterr().err


def test_a_tensorboard_that_dies_stops_nothing(tmp_path):
  writer = MetricsWriter(tmp_path)

  class Dead:
    def add_scalar(self, *_):
      raise RuntimeError("dead")

    close = add_scalar

  writer.close()
  writer._board = Dead()
  writer.write(1, {"loss": 1.0})
  writer.write(2, {"loss": 2.0})
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
  writer = MetricsWriter(tmp_path)
  writer.write(2, {"loss": 2.0})
  writer.close()
  lines = path.read_text().splitlines()
  assert len(lines) == 3
  assert json.loads(lines[2]) == {"step": 2, "loss": 2.0}


def test_skipped_steps_are_said_where_they_cannot_be_written(tmp_path, capsys):
  path = tmp_path / "non_finite.jsonl"
  path.mkdir()
  guard = NonFinite(path, limit=0)
  guard.note(1, jnp.asarray(True), np.array([7]))
  guard.check(1)
  assert "'records': [7]" in capsys.readouterr().err
