"""One and two processes: stopped, starved of numbers, killed, gone on with."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from distributed_test import COMMAND
from faults.tiny_run import options

from argenseg_jax import integrity, stopping
from argenseg_jax.data.ref_shapes import builder

_DRIVER = pathlib.Path(__file__).parent / "driver.py"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Starts the processes of a run, one a fault."""
  folder = tmp_path_factory.mktemp("processes")
  data = builder.prepare(folder / "data", num_train=24, num_eval=8, seed=0)
  env = os.environ | {
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }

  def start(workdir, *faults, limit=900, arguments=()):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    ended = []
    processes = [
      subprocess.Popen(
        [
          *(sys.executable, str(_DRIVER), fault, *COMMAND[3:]),
          *options(data, workdir),
          "--config.mllm.train.steps=12",
          "--config.mllm.train.save_every=4",
          "--config.loss.drop_scale_inputs=0.4",
          *arguments,
          *(
            [
              f"--coordinator={address}",
              f"--num_processes={len(faults)}",
              f"--process_id={i}",
            ]
            if len(faults) > 1
            else []
          ),
        ],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for i, fault in enumerate(faults)
    ]
    try:
      for process in processes:
        output, _ = process.communicate(timeout=limit)
        ended.append((process.returncode, output))
    finally:
      for process in processes:
        process.kill()
    return ended

  return start


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _losses(workdir):
  values = _lines(workdir / "mllm" / "metrics.jsonl")
  return {v["step"]: v["loss"] for v in values if "loss" in v}


def _steps(workdir):
  folder = workdir / "mllm" / "checkpoints"
  for step in folder.iterdir():
    assert integrity.faults(step) == ()
  return sorted(int(step.name) for step in folder.iterdir())


def test_stopped_and_gone_on_with_by_one_two_and_one_process(start, tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  ((code, output),) = start(whole, "nan:5")
  assert code == 0, output
  expected = _losses(whole)

  ((code, output),) = start(parts, "term:3")
  assert code == stopping.INTERRUPTED, output
  assert "stopped at step 3" in output
  assert _steps(parts) == [3]

  # Only the second of two hosts has bad numbers, and is told to stop.
  first, second = start(parts, "", "nan:5,term:6,slow:7,slow:8,slow:9")
  assert first[0] == second[0] == stopping.INTERRUPTED, first[1] + second[1]
  stopped = max(_steps(parts))
  assert stopped >= 6
  (skipped,) = _lines(parts / "mllm" / "non_finite.jsonl")
  assert skipped["step"] == 5

  ((code, output),) = start(parts, "")
  assert code == 0, output
  found = _losses(parts)
  for step in found.keys() - {5}:
    assert found[step] == pytest.approx(expected[step], abs=1e-5)


def test_the_death_of_a_host_ends_the_others(start, tmp_path):
  (code, output), (killed, _) = start(
    tmp_path / "run",
    *("", "kill:2"),
    limit=180,
    arguments=["--heartbeat_seconds=5"],
  )
  assert killed == -9
  assert code not in (0, None), output
