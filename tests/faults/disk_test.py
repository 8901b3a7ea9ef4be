"""A full disk ends a run with one sentence; a dead log does not end it."""

import contextlib
import json
import shutil
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from argenseg_jax.checkpoint import CheckpointError, Checkpoints, manifest
from argenseg_jax.runtime.metric_writer import MetricsWriter
from argenseg_jax.runtime.nan_guard import NonFinite, Verdict
from argenseg_jax.runtime.tracker import Tracked
from argenseg_jax.tools import cli


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
  assert manifest.faults(small_disk / "checkpoints" / "1") == ()
  again = Checkpoints(small_disk, keep=3)
  assert again.newest_good() == 1
  again.save(2, _state(64), (jnp.zeros(2),), {})
  again.wait()
  again.close()
  assert manifest.faults(small_disk / "checkpoints" / "2") == ()


def _fill(folder):
  """Leaves no byte of a disk free; returns the file that took them."""
  path = folder / "filling"
  with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
    while True:
      file.write(bytes(4096))
  return path


def _lines(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _on_the_board(workdir):
  """(step, name, value) of what TensorBoard reads."""
  (path,) = (workdir / "tensorboard").iterdir()
  return [
    (event.step, v.tag, v.simple_value)
    for event in _events(path)
    for v in event.summary.value
  ]


def _events(path):
  raw, found = path.read_bytes(), []
  while raw:
    (length,) = struct.unpack("<Q", raw[:8])
    body, raw = raw[: 16 + length], raw[16 + length :]
    for at, of in ((8, body[:8]), (12 + length, body[12:-4])):
      assert struct.unpack("<I", body[at : at + 4])[0] == masked_crc32c(of)
    found.append(event_pb2.Event.FromString(body[12:-4]))
  return found


def test_a_run_that_finds_a_full_disk_says_so(small_disk, request, capsys):
  (small_disk / "run").mkdir()
  _fill(small_disk)
  config = request.config.rootpath / "configs" / "tiny.py"
  command = ["train", f"--config={config}", "--config.data.path=x"]
  assert cli.main([*command, f"--workdir={small_disk / 'run'}"]) == 2
  (said,) = capsys.readouterr().err.splitlines()
  assert "No space left on device" in said


def test_metrics_that_cannot_be_written_are_said_once(tmp_path, capsys):
  (tmp_path / "metrics.jsonl").mkdir()
  writer = MetricsWriter(Tracked(tmp_path))
  for step in range(3):
    writer.write(step, {"loss": 1.0, "a/b": step})
  assert capsys.readouterr().err.count("metrics are not written") == 1
  assert len(_on_the_board(tmp_path)) == 6
  assert _on_the_board(tmp_path)[-1] == (2, "a/b", 2.0)


def test_metrics_go_on_when_a_full_disk_has_room_again(small_disk, capsys):
  writer = MetricsWriter(Tracked(small_disk))
  writer.write(1, {"loss": 1.0})
  filling = _fill(small_disk)
  for step in range(2, 200):
    writer.write(step, {"loss": 1.0})
  filling.unlink()
  writer.write(200, {"loss": 2.0})
  last = (small_disk / "metrics.jsonl").read_text().splitlines()[-1]
  assert json.loads(last) == {"step": 200, "loss": 2.0}
  assert "No space left on device" in capsys.readouterr().err


def test_without_tensorboard_metrics_are_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  writer = MetricsWriter(Tracked(tmp_path))
  writer.write(1, {"loss": 1.0})
  assert _lines(tmp_path) == [{"step": 1, "loss": 1.0}]
  assert "tensorboardX" in capsys.readouterr().err


def test_a_tensorboard_that_is_no_folder_stops_nothing(tmp_path, capsys):
  (tmp_path / "tensorboard").write_text("a file")
  writer = MetricsWriter(Tracked(tmp_path))
  for step in range(3):
    writer.write(step, {"loss": 1.0})
  assert [line["step"] for line in _lines(tmp_path)] == [0, 1, 2]
  assert capsys.readouterr().err.count("TensorBoard gets no metrics") == 1


def test_a_tensorboard_whose_folder_goes_stops_nothing(tmp_path, capsys):
  writer = MetricsWriter(Tracked(tmp_path))
  writer.write(1, {"loss": 1.0})
  shutil.rmtree(tmp_path / "tensorboard")
  for step in (2, 3):
    writer.write(step, {"loss": 1.0})
  assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]
  assert capsys.readouterr().err.count("TensorBoard gets no metrics") == 1


def test_a_tensorboard_whose_disk_fills_stops_nothing(
  small_disk, tmp_path_factory, capsys
):
  """It hung: tensorboardX's thread died and its queue filled up."""
  workdir = tmp_path_factory.mktemp("run")
  (workdir / "tensorboard").symlink_to(small_disk)
  writer = MetricsWriter(Tracked(workdir))
  _fill(small_disk)
  for step in range(100):
    writer.write(step, {f"x{i}": 1.0 for i in range(20)})
  assert [line["step"] for line in _lines(workdir)] == list(range(100))
  assert capsys.readouterr().err.count("TensorBoard gets no metrics") == 1


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
  writer = MetricsWriter(Tracked(tmp_path))
  writer.write(2, {"loss": 2.0})
  lines = path.read_text().splitlines()
  assert len(lines) == 3
  assert json.loads(lines[2]) == {"step": 2, "loss": 2.0}


def test_skipped_steps_are_said_where_they_cannot_be_written(tmp_path, capsys):
  path = tmp_path / "non_finite.jsonl"
  path.mkdir()
  guard = NonFinite(path, limit=0)
  yes = jnp.asarray(True)
  guard.note(1, Verdict(yes, ~yes, np.array([7])))
  guard.check(1)
  assert "'records': [7]" in capsys.readouterr().err


def test_numbers_that_are_none_are_null_and_flagged(tmp_path):
  writer = MetricsWriter(Tracked(tmp_path))
  writer.write(1, {"loss": float("nan"), "rate": 0.5, "norm": float("inf")})
  (line,) = _lines(tmp_path)
  assert line == {
    "step": 1,
    "loss": None,
    "rate": 0.5,
    "norm": None,
    "not_finite": ["loss", "norm"],
  }
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_run_writes_no_step_twice(tmp_path):
  before = MetricsWriter(Tracked(tmp_path, 0))
  for step in (1, 2, 3):
    before.write(step, {"loss": 1.0})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('not ours\n{"step": 4, "lo')
  after = MetricsWriter(Tracked(tmp_path, 1))
  for step in (2, 3):
    after.write(step, {"loss": 2.0})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert "not ours" in lines
  steps = [
    json.loads(x)["step"]
    for x in lines
    if x.startswith('{"step"') and x.endswith("}")
  ]
  assert steps == [1, 2, 3]
  starts = [
    event.step
    for path in (tmp_path / "tensorboard").iterdir()
    for event in _events(path)
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  assert 2 in starts
