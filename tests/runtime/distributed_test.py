"""One config on one device, eight devices, two and four processes: equal
losses."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny_run

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny_run.write_data(tmp_path_factory.mktemp("data"))


def start(data, workdir, devices, *arguments) -> subprocess.Popen:
  return subprocess.Popen(
    [*tiny_run.COMMAND, *tiny_run.options(data, workdir), *arguments],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def losses(workdir, processes) -> dict[int, float]:
  for process in processes:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
  return tiny_run.losses(workdir / "mllm")


def start_together(data, workdir, processes, *arguments):
  """One device a process."""
  address = tiny_run.free_address()
  return [
    start(
      data,
      workdir,
      1,
      f"--coordinator={address}",
      f"--num_processes={processes}",
      f"--process_id={i}",
      *arguments,
    )
    for i in range(processes)
  ]


@pytest.fixture(scope="module")
def of_one_device(data, tmp_path_factory) -> dict[int, float]:
  workdir = tmp_path_factory.mktemp("one")
  found = losses(workdir, [start(data, workdir, 1)])
  assert len(found) == 5
  return found


_SPLIT = ("--config.mesh.data=2", "--config.mesh.fsdp=-1")


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(data, of_one_device, tmp_path):
  found = losses(tmp_path, start_together(data, tmp_path, 2))
  assert found == pytest.approx(of_one_device, abs=1e-5)
  lines = (tmp_path / "mllm" / "metrics.jsonl").read_text().splitlines()
  last = json.loads(lines[4])
  assert last["hosts/slowest"] in (0, 1)
  assert 0 < last["hosts/own_seconds_min"] < last["hosts/own_seconds_max"]
  assert last["hosts/step_seconds_max"] >= last["hosts/own_seconds_max"]


@pytest.mark.long
def test_eight_devices_have_the_losses_of_one(data, of_one_device, tmp_path):
  found = losses(tmp_path, [start(data, tmp_path, 8, *_SPLIT)])
  assert found == pytest.approx(of_one_device, abs=1e-5)


@pytest.mark.long
def test_four_processes_have_the_losses_of_one(data, of_one_device, tmp_path):
  """Parameters and moments are split between the processes."""
  found = losses(tmp_path, start_together(data, tmp_path, 4, *_SPLIT))
  assert found == pytest.approx(of_one_device, abs=1e-5)


@pytest.mark.parametrize(
  "given", [("host:1", 2, -1), ("", 2, 0), ("host", 2, 0), ("host:1", 2, 2)]
)
def test_half_a_coordinator_is_refused(given):
  with pytest.raises(ConfigError, match="--coordinator=HOST:PORT"):
    distributed.initialize(*given)


def test_no_heartbeat_is_refused():
  with pytest.raises(ConfigError, match="heartbeat_seconds=0 must be 1"):
    distributed.initialize(heartbeat_seconds=0)


def test_a_single_process_is_no_cluster(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert not distributed.in_cluster()
  monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
  monkeypatch.setenv("SLURM_NTASKS", "2")
  assert distributed.in_cluster()


@pytest.mark.parametrize("address", ["host:", "host:x", "host:0", "host:99999"])
def test_a_port_that_is_none_is_refused(address):
  with pytest.raises(ConfigError, match="needs a port from 1 to 65535"):
    distributed.initialize(address, 2, 0)


def test_a_port_that_is_taken_is_named():
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(
      ConfigError, match=f"port {port} of --coordinator cannot"
    ):
      distributed.initialize(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize("process", [0, 1])
def test_a_host_that_never_comes_is_said(process):
  code = (
    "from argenseg_jax.runtime import distributed; distributed.initialize("
    f"{tiny_run.free_address()!r}, 2, {process}, start_seconds=1)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 2, done.stderr
  assert "did not come within 1 s" in done.stderr.splitlines()[-1]


_REFUSED = """
import sys
from argenseg_jax.data.errors import DataError
from argenseg_jax.runtime import distributed
from argenseg_jax.tools import checkpoint, cli
def main(argv):
  address, process, refused = argv[0], int(argv[1]), int(argv[2])
  distributed.initialize(address, 3, process)
  if process == refused:
    raise DataError("mine.jsonl does not exist.")
  distributed.wait_for_all("never")
checkpoint.main = main
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
  "refused", [0, pytest.param(1, marks=pytest.mark.slow)]
)
def test_what_ends_one_host_ends_all_with_its_sentence(refused):
  """The others waited, and ended minutes later with a dump of their stacks."""
  address = tiny_run.free_address()
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, "-c", _REFUSED, "checkpoint"),
        *(address, str(process), str(refused)),
      ],
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(3)
  ]
  for process in processes:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert said.rstrip().endswith("mine.jsonl does not exist."), said


def test_half_of_slurm_is_a_sentence(monkeypatch):
  monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
  for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
  monkeypatch.setenv("SLURM_NTASKS", "two")
  with pytest.raises(ConfigError, match=r"SLURM_\*"):
    distributed.initialize()
