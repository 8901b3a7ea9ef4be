"""One and two processes: stopped, starved of numbers, killed, gone on with."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from tiny_run import COMMAND, free_address, options

from argenseg_jax.checkpoint import manifest
from argenseg_jax.data.ref_shapes import builder
from argenseg_jax.runtime import preemption
from argenseg_jax.training import loop

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
    address = free_address()
    ended = []
    processes = [
      subprocess.Popen(
        [
          *(sys.executable, str(_DRIVER), fault, *COMMAND[3:]),
          *options(data, workdir),
          "--config.mllm.train.steps=24",
          "--config.mllm.train.save_every=8",
          "--config.mllm.train.max_skipped=2",
          "--config.mllm.train.grace_seconds=600",
          "--config.eval.batch_size=4",
          "--config.loss.drop_scale_inputs=0.4",
          *(
            [
              f"--coordinator={address}",
              f"--num_processes={len(faults)}",
              f"--process_id={i}",
              "--heartbeat_seconds=600",  # A loaded machine may be silent.
            ]
            if len(faults) > 1
            else []
          ),
          *arguments,
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
    assert manifest.faults(step) == ()
  return sorted(int(step.name) for step in folder.iterdir())


# What two hosts are given, and the steps at which they may agree to stop: the
# one that is told waits, the other may be a step or two ahead.
MOMENTS = {
  "compilation": ("", "compile:4", (4, 5)),
  "data": ("", "nan:6,data:7", (7, 8)),
  "training": ("", "term:10", (10, 11, 12)),
  "evaluation": ("", "evaluate:1", (14,)),
  "save": ("save:16", "", (17, 18, 19)),
}


@pytest.mark.long
def test_stopped_and_gone_on_with_by_one_two_and_one_process(start, tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  # What this one is for is over when it diverges.
  ((code, output),) = start(whole, "nan:6,nan:21,nan:22")
  assert code == loop.DIVERGED, output
  assert "not finite in 2 steps in a row, the last of them 22" in output
  expected = {k: v for k, v in _losses(whole).items() if k < 21}
  assert len(expected) == 20

  evaluated = ["--config.mllm.train.eval_every=14"]
  ((code, output),) = start(parts, "term:3", arguments=evaluated)
  assert code == preemption.INTERRUPTED, output
  assert "stopped at step 3" in output
  assert _steps(parts) == [3]

  for moment, (*faults, may_stop) in MOMENTS.items():
    first, second = start(parts, *faults, arguments=evaluated)
    output = f"{moment}: {first[1]}\n{second[1]}"
    assert first[0] == second[0] == preemption.INTERRUPTED, output
    assert output.count("SIGTERM: ") == 1, output
    steps = _steps(parts)
    assert steps[-1] in may_stop, output
    assert moment != "save" or steps[-2] == 16, output
  (skipped,) = _lines(parts / "mllm" / "non_finite.jsonl")
  assert skipped["step"] == 6
  written = _lines(parts / "mllm" / "metrics.jsonl")
  assert not any("val/ciou" in line for line in written)  # It was cut short.

  ((code, output),) = start(parts, "", arguments=evaluated)
  assert code == 0, output
  found = _losses(parts)
  compared = found.keys() & expected.keys() - {6}
  assert len(compared) >= 12
  for step in compared:
    assert found[step] == pytest.approx(expected[step], abs=1e-5)


@pytest.mark.slow
def test_hosts_that_cannot_stop_end_within_their_grace_time():
  code = """
import ctypes, os, signal, sys, threading
from argenseg_jax.runtime import distributed, preemption
address, process = sys.argv[1], int(sys.argv[2])
distributed.initialize(address, 2, process)
distributed.wait_for_all("connected")
with preemption.listening(7.0):
  if process == 1:
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    # As in a compilation, no Python code runs in the main thread.
    ctypes.CDLL(None).sleep(60)
    ctypes.CDLL(None).sleep(60)
  distributed.wait_for_all("never")  # Fails as soon as the other has ended.
"""
  address = free_address()
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code, address, str(i)],
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for process in processes:
      _, said = process.communicate(timeout=90)
      assert process.returncode == preemption.INTERRUPTED, said
      assert "resumes from the last complete checkpoint" in said
  finally:
    for process in processes:
      process.kill()


@pytest.mark.slow
def test_the_death_of_a_host_ends_the_others(start, tmp_path):
  (code, output), (killed, _) = start(
    tmp_path / "run",
    *("", "kill:2"),
    limit=180,
    arguments=["--heartbeat_seconds=5"],
  )
  assert killed == -9
  assert code not in (0, None), output
