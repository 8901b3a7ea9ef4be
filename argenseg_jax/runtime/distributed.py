"""Several processes, one a host: how they start, agree and write."""

import contextlib
import errno
import glob
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import paths


def initialize(
  coordinator: str = "",
  num_processes: int = 0,
  process_id: int = -1,
  heartbeat_seconds: int = 100,
  start_seconds: int = 300,
) -> None:
  """Joins the other processes of a run; does nothing for a single one.

  Without arguments it looks for a cluster: Slurm with several tasks, TPU hosts,
  or a coordinator in `JAX_COORDINATOR_ADDRESS`. Call it before any use of
  devices.

  Args:
    coordinator: "HOST:PORT" of process 0.
    num_processes: of the run.
    process_id: of this one, from 0.
    heartbeat_seconds: the others end when one has been silent for so long.
    start_seconds: how long to wait for the others.

  Raises:
    config.ConfigError: only some of the arguments are given, or no second is;
      the processes do not find each other.
  """
  for flag, seconds in (
    ("heartbeat_seconds", heartbeat_seconds),
    ("start_seconds", start_seconds),
  ):
    if seconds < 1:
      raise ConfigError(f"--{flag}={seconds} must be 1 or more.")
  patience: dict[str, Any] = {
    "heartbeat_timeout_seconds": heartbeat_seconds,
    "initialization_timeout": start_seconds + _LATER,
  }
  given = (bool(coordinator), num_processes > 0, process_id >= 0)
  if any(given):
    if not all(given) or process_id >= num_processes or ":" not in coordinator:
      raise ConfigError(
        "give --coordinator=HOST:PORT, --num_processes=N and --process_id=I "
        "with I below N together."
      )
    port = coordinator.rpartition(":")[2]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
      raise ConfigError(
        f"--coordinator={coordinator} needs a port from 1 to 65535 behind the "
        "colon."
      )
    if process_id == 0:
      _require_free(int(port))
    patience |= {
      "coordinator_address": coordinator,
      "num_processes": num_processes,
      "process_id": process_id,
    }
  elif not in_cluster():
    return
  try:
    with _ended_after(start_seconds):
      jax.distributed.initialize(**patience)
  except Exception as error:  # Each kind of cluster has errors of its own.
    reason = f"{type(error).__name__}: {paths.said(error)}"
    raise ConfigError(_NOT_MET.format(reason)) from error
  if is_several():
    threading.Thread(target=_listen, name="listen", daemon=True).start()


_LATER = 60  # Seconds after which JAX would abort, without a sentence.
_NOT_MET = (
  "the processes of this run did not find each other ({}); see that every host "
  "runs the same command with its own number, reaches the coordinator's port "
  "and has all variables of its cluster (such as SLURM_*), or give "
  "--coordinator, --num_processes and --process_id, or more --start_seconds."
)


@contextlib.contextmanager
def _ended_after(seconds: int) -> Iterator[None]:
  """Ends the process with a sentence where its body takes longer: JAX waits in
  C, and ends with a dump of its stack."""
  met = threading.Event()

  def watch() -> None:
    if not met.wait(seconds):
      reason = f"one did not come within {seconds} s"
      print(f"argenseg: {_NOT_MET.format(reason)}", file=sys.stderr, flush=True)
      os._exit(2)

  threading.Thread(target=watch, name="start", daemon=True).start()
  try:
    yield
  finally:
    met.set()


def _require_free(port: int) -> None:
  """The coordinator would wait for a port that another program holds."""
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", port))
    except OSError as error:
      if error.errno in (errno.EADDRINUSE, errno.EACCES):
        raise ConfigError(
          f"port {port} of --coordinator cannot be used on this host "
          f"({error.strerror}); give another port on every host."
        ) from error


def in_cluster() -> bool:
  """Whether the environment says that this process is one of several."""
  env = os.environ
  if env.get("JAX_COORDINATOR_ADDRESS"):
    return True
  if "SLURM_STEP_NODELIST" in env and env.get("SLURM_NTASKS", "1") != "1":
    return True
  if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
    return False
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def is_several() -> bool:
  """Whether this process has joined others."""
  return (_state().num_processes or 1) > 1


def end_all(said: str, code: int) -> None:
  """Ends this process, which cannot continue, and with it all others of its
  run, which would wait for it. Does nothing in a process that is alone.

  Args:
    said: why, for the others to say.
    code: exit code of all.
  """
  if not is_several():
    return
  with contextlib.suppress(Exception):  # Another one may have been faster.
    _state().client.key_value_set(
      _ENDED, f"{code} {_state().process_id} {said}"
    )
  _leave(code)


def _listen() -> None:
  """Ends this process once another one has called `end_all`."""
  while True:
    time.sleep(_LISTEN_SECONDS)
    found = _found(_ENDED)
    if found is not None:
      code, process, said = found.split(" ", 2)
      if int(process) == _state().process_id:
        return  # It is about to leave.
      print(
        f"argenseg: process {process} has ended, and so do all: {said}",
        file=sys.stderr,
      )
      _leave(int(code))


def _leave(code: int) -> None:
  """Ends without JAX's farewell, which would wait for those that have left;
  process 0 last, because the others hear each other through it."""
  state = _state()
  with contextlib.suppress(Exception):
    state.client.key_value_set(f"{_ENDED}/{state.process_id}", "heard")
  others = set(range(1, state.num_processes)) if state.process_id == 0 else ()
  until = time.monotonic() + _FAREWELL_SECONDS
  while others and time.monotonic() < until:
    others = {i for i in others if _found(f"{_ENDED}/{i}") is None}
    time.sleep(0.1)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


_ENDED = "argenseg/ended"  # At the coordinator: who ended all, and why.
_LISTEN_SECONDS = 1.0
_FAREWELL_SECONDS = 10.0


def _state() -> Any:
  """JAX's own, which has no public face: coordinator's client, numbers."""
  from jax._src import distributed as private

  return private.global_state


def _found(key: str) -> str | None:
  """What stands at the coordinator; None if nothing does, or it is gone."""
  try:
    return _state().client.key_value_try_get(key)
  except Exception:  # Also what tells that there is no such key.
    return None


def is_main() -> bool:
  """Whether this process writes what only one may write."""
  return jax.process_index() == 0


def agree(value: bool) -> bool:
  """What process 0 says."""
  return bool(from_main(int(value)))


def agree_any(value: bool) -> bool:
  """Whether it is true in any process."""
  return bool(largest(int(value)))


def largest(value: int) -> int:
  """The largest of all processes' numbers."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.asarray(value)).max())


def from_main(value: int) -> int:
  """The number that process 0 holds."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def wait_for_all(name: str) -> None:
  """Returns once every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def gathered(values: list[Any]) -> list[Any]:
  """JSON values of every process, in the order of processes, on all."""
  if jax.process_count() == 1:
    return values
  raw = np.frombuffer(json.dumps(values).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(raw)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(raw)] = raw
  whole = multihost_utils.process_allgather(padded)
  return [
    value
    for part, size in zip(whole, sizes, strict=True)
    for value in json.loads(part[: int(size)].tobytes())
  ]


def noted_by_all(name: str, value: Any) -> dict[int, Any]:
  """Leaves a JSON value at the coordinator, in place of the one that this
  process left there before; nobody waits for anybody.

  Returns:
    On process 0 what each process has left there last, on others nothing.
  """
  try:
    client, own = _state().client, jax.process_index()
    folder = f"argenseg/{name}/"
    client.key_value_set(
      f"{folder}{own}", json.dumps(value), allow_overwrite=True
    )
    found = client.key_value_dir_get(folder) if own == 0 else ()
    return {int(k.rsplit("/", 1)[1]): json.loads(v) for k, v in found}
  except Exception:  # It is on its way out; the run will hear of that.
    return {}


def own_rows(array: jax.Array) -> np.ndarray:
  """This process's rows of an array that only its rows split."""
  if array.is_fully_addressable:
    return jax.device_get(array)
  shards = {s.index[0].start: s.data for s in array.addressable_shards}
  return np.concatenate([np.asarray(shards[k]) for k in sorted(shards)])


def fetch(tree: Any) -> Any:
  """Whole arrays on every host, from shards anywhere."""

  def one(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)

  return jax.tree.map(one, tree)


def stop_requested(poll: int) -> bool:
  """Whether SIGTERM came to any of several hosts; the same answer on all.

  Args:
    poll: how often this has been asked, counted alike on every host.
  """
  return multihost_utils.reached_preemption_sync_point(poll)


def stop_noticed() -> bool:
  """Whether JAX has told all of several hosts that SIGTERM came to one.

  Unlike `stop_requested` any thread may ask, as often as it likes, and hosts
  may get different answers for about a second. It reads what JAX's listener
  leaves at the coordinator; a JAX that leaves nothing there is never heard.
  """
  return _found(_NOTICE) is not None


# Of xla/pjrt/distributed/coordination/preemption_sync_manager.cc.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
