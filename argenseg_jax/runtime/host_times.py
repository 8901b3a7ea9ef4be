"""How this host's steps went, and how the hosts of a run compare."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping

import jax

from argenseg_jax.runtime import distributed
from argenseg_jax.runtime.goodput import Goodput

_RUNNING = ("productive", "data")  # Seconds that belong to steps.
_GIB = 2**30


class HostTimes:
  """What steps cost a host, between one line of the log and the next.

  Every host waits for the slowest in each step, so that their step times are
  nearly equal. What tells them apart is their own work: the seconds in which a
  host did not wait for its devices.

  Args:
    name: of what runs, the same on every host.
    goodput: of this host.
    start: step that training starts from.
  """

  def __init__(self, name: str, goodput: Goodput, start: int):
    self._name, self._goodput, self._step = name, goodput, start
    self._before = dict.fromkeys(_RUNNING, 0.0)
    self._waited = 0.0

  @contextlib.contextmanager
  def waits(self) -> Iterator[None]:
    """Within it, the host waits for its devices."""
    began = time.monotonic()
    try:
      yield
    finally:
      self._waited += time.monotonic() - began

  def __call__(self, step: int) -> dict[str, float]:
    """Metrics since the last call, to be called on every host alike: this
    host's, and on process 0 of a run of several those of all, as far as they
    have come in."""
    shares = self._goodput()
    now = {kind: shares[f"seconds/{kind}"] for kind in _RUNNING}
    spent = {kind: now[kind] - self._before[kind] for kind in _RUNNING}
    seconds, steps = sum(spent.values()), max(step - self._step, 1)
    waited, self._waited = self._waited, 0.0
    self._before, self._step = now, step
    values = {
      "data_wait": spent["data"] / seconds if seconds else 0.0,
      **memory(),
    }
    if not distributed.is_several():
      return shares | values
    own = values | {
      "step_seconds": seconds / steps,
      "own_seconds": max(seconds - waited, 0.0) / steps,
      "goodput": shares["goodput"],
    }
    hosts = distributed.noted_by_all(f"host_times/{self._name}", own)
    return shares | values | compared(hosts)


def compared(hosts: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
  """Least and most of each number, and which process does most work of its own
  in a step.

  Args:
    hosts: numbers of each process.
  """
  values: dict[str, float] = {}
  for name in sorted({name for own in hosts.values() for name in own}):
    found = [own[name] for own in hosts.values() if name in own]
    values[f"hosts/{name}_min"] = min(found)
    values[f"hosts/{name}_max"] = max(found)
  if hosts:
    slowest = max(hosts, key=lambda i: hosts[i].get("own_seconds", 0.0))
    values["hosts/slowest"] = float(slowest)
  return values


def memory() -> dict[str, float]:
  """GiB of this process's fullest device, where its platform counts them, and
  the most that the process itself has held."""
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  unit = 1 if sys.platform == "darwin" else 2**10
  values = {"memory/host_peak_gib": most * unit / _GIB}
  counted = [device.memory_stats() or {} for device in jax.local_devices()]
  for name, key in (
    ("memory/device_gib", "bytes_in_use"),
    ("memory/device_peak_gib", "peak_bytes_in_use"),
  ):
    found = [stats[key] for stats in counted if key in stats]
    if found:
      values[name] = max(found) / _GIB
  return values
