"""One run at a time in a work directory."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from argenseg_jax.config import ConfigError

NAME = "lock.json"


@contextlib.contextmanager
def owned(workdir: pathlib.Path) -> Iterator[None]:
  """Holds a work directory, which is made if it is not there.

  The system lets go of the lock when its process ends, however it ends.

  Raises:
    ConfigError: another process holds it.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / NAME
  with path.open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(
        f"work directory {workdir} is in use by {_owner(path)}; wait for it, "
        "stop it, or give another directory."
      ) from None
    file.truncate(0)
    file.write(
      json.dumps(
        {
          "process": os.getpid(),
          "host": socket.gethostname(),
          "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
      )
    )
    file.flush()
    yield


def _owner(path: pathlib.Path) -> str:
  try:
    owner = json.loads(path.read_text())
    return f"process {owner['process']} on {owner['host']} ({owner['since']})"
  except (OSError, ValueError, KeyError):  # It has not written that yet.
    return "another process"
