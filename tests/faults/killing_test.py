"""SIGKILL at random moments and inside saves: nothing is lost."""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.long
def test_killed_runs_end_as_one_that_was_not(tmp_path):
  script = pathlib.Path(__file__).parent / "killing.py"
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_NUM_CPU_DEVICES": "1",
  }
  done = subprocess.run(
    [
      *(sys.executable, str(script), "--kills=10", "--steps=8"),
      f"--folder={tmp_path / 'kills'}",
    ],
    env=os.environ | cache,
    capture_output=True,
    text=True,
    timeout=1200,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "'in a save': 5" in done.stdout
