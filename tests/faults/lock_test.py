"""Two runs never write one work directory."""

import json
import os
import subprocess
import sys

import pytest

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import lock
from argenseg_jax.tools import cli

_HOLD = """
import pathlib, sys, time
from argenseg_jax.runtime import lock
with lock.owned(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds `tmp_path`."""
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def test_a_second_run_is_refused_and_told_who_holds_it(holder, tmp_path):
  owner = (tmp_path / lock.NAME).read_text()
  with (
    pytest.raises(ConfigError, match=f"in use by process {holder.pid} on "),
    lock.owned(tmp_path),
  ):
    pass
  assert (tmp_path / lock.NAME).read_text() == owner


def test_argenseg_train_is_refused_too(holder, tmp_path, request, capsys):
  config = request.config.rootpath / "configs" / "tiny.py"
  command = ["train", f"--config={config}", "--config.data.path=x"]
  assert cli.main([*command, f"--workdir={tmp_path}"]) == 2
  (said,) = capsys.readouterr().err.splitlines()
  assert f"in use by process {holder.pid} on " in said
  assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_a_killed_run_leaves_no_lock(holder, tmp_path):
  holder.kill()
  holder.wait()
  with lock.owned(tmp_path):
    owner = json.loads((tmp_path / lock.NAME).read_text())
  assert owner["process"] == os.getpid()


@pytest.mark.parametrize("content", ["{}", "[1]", '{"name": "npm"}', "\xff"])
def test_a_lock_of_something_else_is_left_alone(content, tmp_path):
  (tmp_path / lock.NAME).write_text(content, encoding="latin1")
  with (
    pytest.raises(ConfigError, match=r"lock\.json is a file of something else"),
    lock.owned(tmp_path),
  ):
    pass
  assert (tmp_path / lock.NAME).read_text(encoding="latin1") == content


def test_a_lock_that_a_kill_left_empty_is_taken(tmp_path):
  (tmp_path / lock.NAME).touch()
  with lock.owned(tmp_path):
    assert json.loads((tmp_path / lock.NAME).read_text())["process"]
