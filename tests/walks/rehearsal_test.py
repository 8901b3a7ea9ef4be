"""docs/pods.md from its first section to its last, at the smallest size.

A bucket, four hosts of which one dies, two that resume, two that evaluate. By
hand: `pytest -m rehearsal`.
"""

import json
import pathlib
import subprocess
import sys
import time

import pytest
import tiny_run
from walks import walking

pytestmark = pytest.mark.rehearsal

_STEPS, _EVERY = 60, 4


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """Beside a folder that every host sees."""
  pytest.importorskip("gcp_storage_emulator", reason="it is the bucket")
  storage = pytest.importorskip(
    "google.cloud.storage", reason="gcsfs brings it"
  )
  import gcs_emulator

  walking.furnish(tmp_path)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  with gcs_emulator.running() as environment:
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    yield storage.Client().bucket(gcs_emulator.BUCKET)


def start(*argv: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "argenseg_jax.tools.cli", *argv],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start_together(count: int, *argv: str) -> list[subprocess.Popen]:
  """One process a host."""
  shared = (
    f"--coordinator={tiny_run.free_address()}",
    f"--num_processes={count}",
  )
  return [start(*argv, *shared, f"--process_id={i}") for i in range(count)]


def finish(*processes: subprocess.Popen) -> str:
  """What the first one printed.

  Raises:
    AssertionError: one ended with another exit code than 0.
  """
  said = [process.communicate(timeout=900)[0] for process in processes]
  for process, output in zip(processes, said, strict=True):
    assert process.returncode == 0, output
  return said[0]


def wait_for(bucket, name: str, processes: list[subprocess.Popen]) -> None:
  while not bucket.blob(name).exists():
    for process in processes:
      assert process.poll() is None, process.communicate()[0]
    time.sleep(0.2)


def test_a_pod(bucket):
  run = f"gs://{bucket.name}/run"
  walking.write_tokenizer(pathlib.Path("tokenizer.json"), "argenseg_8b")
  sizes = walking.small_variant(*walking.SMALL_IMAGES)
  sizes += ["--config.data.mask_side=32", "--config.data.source=jsonl"]
  tokenizer = [
    "--config=configs/vqvae_masks_256.py",
    "--config.vqvae.train.compute_dtype=float32",
    "--config.data.path=mine.jsonl",
    *sizes,
  ]
  decoder = [
    "--config=configs/argenseg_8b_stage1.py",
    "--config.init_from=runs/tokenizer/vqvae",
    "--config.data.path=mine.jsonl",
    "--config.data.text_tokenizer=tokenizer.json",
    "--config.data.sequence_length=256",
    *sizes,
    f"--config.mllm.train.steps={_STEPS}",
    f"--config.mllm.train.save_every={_EVERY}",
  ]

  # Before anything is rented.
  assert "needs" in finish(start("plan", "--topology=cpu:4", *decoder))

  # An image tokenizer, and the codes of all masks.
  finish(start("train", "--workdir=runs/tokenizer", *tokenizer))
  made = ("--checkpoint=runs/tokenizer/vqvae", "--out=codes.npz")
  finish(start("data", "tokenize", "jsonl=mine.jsonl", *made))

  # Four hosts train, and the last one dies.
  train = ("train", f"--workdir={run}", *decoder)
  train += ("--config.data.codes=codes.npz", "--heartbeat_seconds=30")
  hosts = start_together(4, *train)
  step = f"run/mllm/checkpoints/{_EVERY}"
  wait_for(bucket, f"{step}/commit_success.txt", hosts)
  hosts[3].kill()
  for host in hosts:
    host.communicate(timeout=300)
    assert host.returncode != 0

  # Two hosts resume to the end.
  finish(*start_together(2, *train))
  text = bucket.blob("run/mllm/metrics.jsonl").download_as_text()
  values = [json.loads(line) for line in text.splitlines()]
  assert [v["step"] for v in values if "loss" in v] == [*range(1, _STEPS + 1)]
  found = bucket.blob("run/mllm/results.json").download_as_text()
  assert json.loads(found)["steps"] == _STEPS

  # Two hosts evaluate, and the weights go to PyTorch.
  measure = ("eval", f"--checkpoint={run}/mllm", f"--out={run}/eval")
  assert "ciou" in finish(*start_together(2, *measure)).lower()
  finish(start("export", "--from", f"{run}/mllm", "--to", "authors"))
  assert any(pathlib.Path("authors").glob("*.safetensors"))
