"""A run whose work directory is in a bucket does what it does on a disk."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from etils import epath
from tiny_run import COMMAND, write_data

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import gcs_lock

pytest.importorskip("gcp_storage_emulator", reason="it is the bucket")
pytest.importorskip("google.cloud.storage", reason="gcsfs brings it")

import gcs_emulator
from google.cloud import storage

pytestmark = pytest.mark.slow

DRIVER = pathlib.Path(__file__).with_name("gcs_driver.py")
RUN = f"gs://{gcs_emulator.BUCKET}/run"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def environment():
  with (
    gcs_emulator.running() as environment,
    pytest.MonkeyPatch.context() as patch,
  ):
    for name, value in environment.items():
      patch.setenv(name, value)
    yield


@pytest.fixture(scope="module")
def bucket(environment):
  return storage.Client().bucket(gcs_emulator.BUCKET)


@pytest.fixture(scope="module")
def argenseg(environment):
  """Calls a command; returns exit code and what it said."""
  process = subprocess.Popen(
    [sys.executable, DRIVER],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def call(*arguments):
    process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())

  yield call
  process.stdin.close()
  assert process.wait(60) == 0
  process.stdout.close()


@pytest.fixture(scope="module")
def trained(argenseg, bucket, data, tmp_path_factory):
  """The same run on a disk and in the bucket, and how to call it again."""
  local = tmp_path_factory.mktemp("local")
  (local / "results.json").write_text("{}")  # Nothing to evaluate.
  bucket.blob("run/results.json").upload_from_string("{}")

  def train(workdir):
    return argenseg(
      *COMMAND[3:],
      f"--config.data.path={data}",
      f"--workdir={workdir}",
      "--config.mllm.train.steps=6",
      "--config.mllm.train.save_every=2",
      "--config.mllm.train.keep=2",
    )

  for workdir in (local, RUN):
    code, said = train(workdir)
    assert code == 0, said
  return SimpleNamespace(local=local, train=train)


def _names(bucket, prefix="run/"):
  return {
    blob.name.removeprefix(prefix) for blob in bucket.list_blobs(prefix=prefix)
  }


def _losses(text):
  values = map(json.loads, text.splitlines())
  return [(v["step"], v["loss"]) for v in values if "loss" in v]


def _log(bucket):
  return bucket.blob("run/mllm/metrics.jsonl").download_as_text()


def test_it_leaves_what_a_run_on_a_disk_leaves(trained, bucket):
  local = {
    path.relative_to(trained.local).as_posix()
    for path in trained.local.rglob("*")
    if path.is_file()
  }

  def outside_checkpoints(names):
    # The name of an event file holds the time.
    return {
      name.split(".tfevents")[0]
      for name in names
      if "/checkpoints/" not in name
    }

  names = _names(bucket)
  assert outside_checkpoints(names) == outside_checkpoints(local) - {
    "lock.json"  # On a disk it stays, unlocked.
  }
  steps = {name.split("/")[2] for name in names if "/checkpoints/" in name}
  assert steps == {"4", "6"}
  on_disk = (trained.local / "mllm" / "metrics.jsonl").read_text()
  assert len(_losses(on_disk)) == 6
  assert _losses(_log(bucket)) == _losses(on_disk)


def test_its_checkpoints_are_read(trained, argenseg, bucket):
  code, said = argenseg(
    "checkpoint", "diff", trained.local / "mllm", RUN + "/mllm"
  )
  assert code == 0, said
  assert said.startswith("0 of "), said
  code, said = argenseg("checkpoint", "verify", RUN)
  assert (code, said.count(": good")) == (0, 2), said
  code, said = argenseg("checkpoint", "ls", RUN)
  assert (code, said.count("whole")) == (0, 2), said
  code, said = argenseg("checkpoint", "inspect", f"{RUN}/mllm/checkpoints/4")
  assert code == 0
  assert f"{RUN}/mllm/checkpoints/4: mllm, format" in said
  evaluate = (
    *("eval", f"--checkpoint={RUN}/mllm", "--split=val", "--max_samples=1"),
    *("--config.eval.max_text=2", f"--out={RUN}/eval"),
  )
  code, said = argenseg(*evaluate)
  assert code == 0, said
  assert "ciou" in said
  answers = f"{RUN}/eval/val/predictions.jsonl"
  code, said = argenseg("eval", f"--rescore={answers}")
  assert code == 0, said
  assert "ciou" in said
  # Interrupted before its end, it would go on there.
  bucket.blob("run/eval/results.json").delete()
  code, said = argenseg(*evaluate, "--dtype=bfloat16")
  assert code == 2
  assert f"{RUN}/eval contains another evaluation" in said
  assert _names(bucket, "run/eval/") == {"eval.json", "val/predictions.jsonl"}


def test_a_downloaded_checkpoint_is_checked(
  trained, argenseg, bucket, tmp_path
):
  for blob in bucket.list_blobs(prefix="run/mllm/checkpoints/4/"):
    path = tmp_path / blob.name.removeprefix("run/mllm/checkpoints/")
    path.parent.mkdir(parents=True, exist_ok=True)
    blob.download_to_filename(path)
  assert argenseg("checkpoint", "verify", tmp_path)[0] == 0
  file = max((tmp_path / "4" / "model").rglob("*"), key=os.path.getsize)
  _flip(file.read_bytes(), file.write_bytes)
  code, said = argenseg("checkpoint", "verify", tmp_path)
  assert code == 1
  assert "has changed" in said


def _flip(content, write):
  content = bytearray(content)
  content[len(content) // 2] ^= 4
  write(bytes(content))


def test_it_goes_back_to_the_newest_good_step(trained, argenseg, bucket):
  before = _log(bucket)
  blobs = bucket.list_blobs(prefix="run/mllm/checkpoints/6/model/")
  largest = max(blobs, key=lambda blob: blob.size)
  _flip(largest.download_as_bytes(), largest.upload_from_string)
  half = bucket.blob("run/mllm/checkpoints/8/model/half")
  half.upload_from_string("a save that was killed")
  step = f"{RUN}/mllm/checkpoints/6"
  code, said = argenseg("checkpoint", "verify", RUN)
  assert code == 1
  assert f"{step}: damaged" in said
  assert "checkpoints/8" not in said

  bucket.blob("run/mllm/results.json").delete()  # It was not done.
  code, said = trained.train(RUN)
  assert code == 0, said
  assert f"{step} is damaged: " in said
  assert "has changed; moved to " in said
  names = _names(bucket)
  assert "mllm/damaged_checkpoints/6/manifest.json" in names
  assert not half.exists()
  after = _log(bucket)
  assert _losses(after) == _losses(before)  # No step stands twice.
  assert (
    argenseg("checkpoint", "diff", trained.local / "mllm", RUN + "/mllm")[0]
    == 0
  )


def test_a_run_that_is_held_is_refused(trained, bucket):
  blob = bucket.blob("run/lock.json")
  note = json.dumps({"process": 7, "host": "h", "since": "then"})
  ended = threading.Event()

  def hold():
    while not ended.wait(1):
      blob.upload_from_string(note)

  blob.upload_from_string(note)
  owner = threading.Thread(target=hold)
  owner.start()
  code, said = trained.train(RUN)
  ended.set()
  owner.join()
  assert code == 2
  assert f"work directory {RUN} is in use by process 7 on h (then)" in said
  assert blob.exists()
  blob.delete()


def _held(owner):
  return gcs_lock.owned(
    epath.Path(f"gs://{gcs_emulator.BUCKET}/held"),
    owner,
    lambda note: ConfigError(f"refused: {note}"),
    beat=0.1,
    dead=0.5,
  )


def test_a_lock_that_nobody_keeps_is_replaced(bucket):
  blob = bucket.blob("held")
  blob.upload_from_string("a killed run")
  with _held("one"):
    assert blob.download_as_text().startswith("one\n")
    with pytest.raises(ConfigError, match="refused: one"), _held("two"):
      pass
    blob.reload()
    generation = blob.generation
    time.sleep(0.5)
    blob.reload()
    assert blob.generation > generation
  assert not blob.exists()


def test_what_is_missing_is_said(trained, argenseg):
  code, said = trained.train("gs://nobucket/run")
  assert code == 2
  assert "cannot write to gs://nobucket/run: 404" in said
  code, said = argenseg("eval", "--checkpoint=gs://nobucket/run")
  assert (code, said) == (
    2,
    "argenseg eval: checkpoint gs://nobucket/run does not exist.\n",
  )
  code, said = argenseg("export", f"--from={RUN}/mllm", "--to=gs://bucket/out")
  assert code == 2
  assert "gs://bucket/out is an address, and this is written to a disk" in said
