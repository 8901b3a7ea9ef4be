"""Launch commands are printed, and run only when asked."""

import os
import shlex

import pytest

from argenseg_jax.tools.launch import __main__ as launch

TRAIN = ["--", "argenseg", "train", "--config=c.py", "--workdir=/gcs/a b"]
SOURCE = "--source=git+https://example.org/x"


def printed(capsys, *argv) -> str:
  assert launch.main([*argv, *TRAIN]) == 0
  return capsys.readouterr().out


def test_tpu_vm(capsys):
  text = printed(capsys, "tpu-vm", "--topology=v5e:16x16", SOURCE)
  create, start = text.splitlines()
  assert "--accelerator-type=v5litepod-256 " in create
  assert "--version=v2-alpha-tpuv5-lite" in create
  assert "--worker=all" in start
  remote = shlex.split(start)[-1]
  assert remote.endswith("&& " + shlex.join(TRAIN[1:]))


def test_queued_resource_of_two_slices(capsys):
  text = printed(
    capsys, "queued-resource", "--topology=v5p:4x4x4", "--slices=2", SOURCE
  )
  create, wait, start = text.splitlines()
  assert "--accelerator-type=v5p-128" in create
  assert "--node-count=2 --node-prefix=argenseg" in create
  assert "grep -q ACTIVE" in wait
  assert "ssh argenseg-0 " in start
  assert "ssh argenseg-1 " in start


def test_xpk(capsys):
  text = printed(capsys, "xpk", "--cluster=c", "--image=i", "--slices=2")
  assert "--num-slices=2" in text
  assert "--tpu-type=v5litepod-256" in text


def test_manifests_name_every_host(capsys):
  text = printed(capsys, "jobset", "--hosts=4", "--image=i", "--name=arg")
  assert "--coordinator=arg-host-0-0.arg:8476" in text
  assert "--process_id=$JOB_COMPLETION_INDEX" in text
  assert "completions: 4" in text
  text = printed(capsys, "sbatch", "--hosts=4")
  assert "#SBATCH --nodes=4" in text
  assert "srun --kill-on-bad-exit=1 argenseg train" in text


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["tpu-vm", "--topology=h100:8", SOURCE], "not as h100"),
    (["tpu-vm"], "--source"),
    (["jobset"], "--image"),
    (["tpu-vm", "--slices=2", SOURCE], "queued-resource"),
  ],
)
def test_what_cannot_be_is_one_sentence(argv, message, capsys):
  with pytest.raises(SystemExit):
    launch.main([*argv, *TRAIN])
  assert message in capsys.readouterr().err


def test_run_executes(tmp_path, capsys, monkeypatch):
  command = tmp_path / "sbatch"
  command.write_text(f"#!/bin/sh\ncat > {tmp_path}/got\n")
  command.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  printed(capsys, "sbatch")
  assert not (tmp_path / "got").exists()
  printed(capsys, "sbatch", "--run")
  assert "srun" in (tmp_path / "got").read_text()
