"""One run at a time in a work directory."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import gcs_lock, paths

NAME = "lock.json"
_KEYS = {"process", "host", "since"}


def owned(
  workdir: paths.Path, waiting: Callable[[bool], object] = bool
) -> contextlib.AbstractContextManager[None]:
  """Holds a work directory, which is made if it is not there.

  On a disk, the system lets go of the lock when its process ends, however it
  ends; for a bucket see `gcs_lock`.

  Args:
    workdir: of a run.
    waiting: see `gcs_lock`.

  Raises:
    ConfigError: another process holds it.
  """

  def refused(note: str) -> ConfigError:
    return ConfigError(
      f"work directory {workdir} is in use by {_owner(note)}; wait for it, "
      "stop it, or give another directory."
    )

  note = json.dumps(
    {
      "process": os.getpid(),
      "host": socket.gethostname(),
      "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
  )
  if paths.is_local(workdir):
    return _owned_on_disk(workdir, note, refused)
  return gcs_lock.owned(workdir / NAME, note, refused, waiting=waiting)


@contextlib.contextmanager
def _owned_on_disk(
  workdir: pathlib.Path, note: str, refused: Callable[[str], ConfigError]
) -> Iterator[None]:
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / NAME
  with path.open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise refused(path.read_text(errors="replace")) from None
    file.seek(0)
    if not _is_note(bytes(file.buffer.read())):
      raise ConfigError(
        f"{path} is a file of something else; give a work directory that is "
        "empty or of an earlier run."
      )
    file.truncate(0)
    file.write(note)
    file.flush()
    yield


def _is_note(content: bytes) -> bool:
  """Whether a run has written it; a killed one may have written nothing."""
  try:
    return not content or set(json.loads(content)) == _KEYS
  except (ValueError, TypeError, RecursionError):
    return False


def _owner(note: str) -> str:
  try:
    owner = json.loads(note)
    return f"process {owner['process']} on {owner['host']} ({owner['since']})"
  except (ValueError, KeyError, TypeError):  # It has not written that yet.
    return "another process"
