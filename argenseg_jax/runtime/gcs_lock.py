"""One run at a time in a work directory of a bucket.

The lock is an object that its owner writes anew every few seconds. Who finds
one watches it: written anew, it has an owner; not for a minute, and it may be
replaced. Google's storage compares the number of an object's version (its
generation) with the one that a writer has seen, so of two writers one fails.
"""

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime.paths import Path, said

BEAT = 10.0  # Seconds between two writes of an owner.
DEAD = 60.0  # Seconds without one after which there is no owner.
LOST = 1  # Exit code of a run that another has replaced.


@contextlib.contextmanager
def owned(
  path: Path,
  owner: str,
  refused: Callable[[str], ConfigError],
  *,
  waiting: Callable[[bool], object] = bool,
  beat: float = BEAT,
  dead: float = DEAD,
) -> Iterator[None]:
  """Holds the lock `path`; a run that stopped holding it ends at once.

  Args:
    path: an object of a gs:// bucket.
    owner: text about this process, for others.
    refused: makes the error from the text of the one who holds it.
    waiting: called with whether the lock is held now, every few seconds until
      it is.
    beat: seconds between two writes.
    dead: seconds after which a lock that nobody writes is replaced.

  Raises:
    ConfigError: another process holds it, or the bucket cannot be written.
  """
  owner = f"{owner}\n{uuid.uuid4()}"
  lock = _Object(path)
  generation = _taken(lock, owner, refused, waiting, beat, dead)
  closed = threading.Event()
  held = [generation]
  thread = threading.Thread(
    target=_keep, args=(lock, owner, held, closed, beat), daemon=True
  )
  thread.start()
  try:
    yield
  finally:
    closed.set()
    thread.join()
    with contextlib.suppress(Exception):  # Then the next run waits a minute.
      lock.delete(held[0])


def _taken(lock, owner, refused, waiting, beat, dead) -> int:
  """The generation of the lock that is ours now."""
  watched, since = 0, 0.0
  while True:
    generation, text = lock.read()
    if text == owner:  # The answer to a write was lost on its way.
      waiting(True)
      return generation
    now = time.monotonic()
    if generation and generation != watched:
      if watched:
        raise refused(text.partition("\n")[0])
      watched, since = generation, now
      print(
        f"{lock} is there; waiting up to {dead:.0f} s to see whether its owner "
        "lives.",
        file=sys.stderr,
        flush=True,
      )
    if not generation or now - since > dead:
      if made := lock.write(owner, generation):
        waiting(True)
        return made
      continue
    time.sleep(beat / 2)
    waiting(False)


def _keep(lock, owner, held, closed, beat) -> None:
  """Writes the lock until `closed`."""
  warned = False
  while not closed.wait(beat):
    try:
      generation = lock.write(owner, held[0])
      if not generation:
        generation, text = lock.read()
        if text != owner:
          print(
            f"{lock} was taken over or deleted; stopping this run.",
            file=sys.stderr,
            flush=True,
          )
          os._exit(LOST)
      held[0] = generation
    except Exception as error:  # The net may come back.
      if not warned:
        print(f"{lock} is not kept: {said(error)}", file=sys.stderr, flush=True)
      warned = True


class _Object:
  """A small object of a bucket, and the generation that it has."""

  def __init__(self, path: Path):
    self._path = path
    scheme, _, place = str(path).partition("://")
    bucket, _, self._name = place.partition("/")
    with self._reached():
      from google.cloud import storage

      if scheme != "gs":
        raise ValueError(f"{scheme}:// is no Google Cloud Storage")
      self._bucket = storage.Client().bucket(bucket)

  def __str__(self) -> str:
    return str(self._path)

  def write(self, text: str, generation: int) -> int:
    """Replaces that generation (0: there is none); returns the new one, or 0
    where it is another."""
    from google.api_core.exceptions import PreconditionFailed

    blob = self._bucket.blob(self._name)
    with self._reached():
      try:
        blob.upload_from_string(text, if_generation_match=generation)
      except PreconditionFailed:
        return 0
    return int(blob.generation or 0)

  def read(self) -> tuple[int, str]:
    """Generation and text; 0 and "" where there is no such object."""
    from google.api_core.exceptions import NotFound

    with self._reached():
      blob = self._bucket.get_blob(self._name)
      if blob is None:
        return 0, ""
      try:
        return int(blob.generation or 0), blob.download_as_text()
      except NotFound:  # That generation has been replaced meanwhile.
        return self.read()

  @contextlib.contextmanager
  def _reached(self) -> Iterator[None]:
    try:
      yield
    except ConfigError:
      raise
    except Exception as error:  # Credentials, permissions, no such bucket, ...
      raise ConfigError(
        f"cannot write to {self._path.parent}: {said(error)}; a work directory "
        "needs a gs:// bucket that exists, the packages gcsfs and "
        "google-cloud-storage, and credentials that may create, read, list and "
        "delete its objects."
      ) from error

  def delete(self, generation: int) -> None:
    self._bucket.blob(self._name).delete(if_generation_match=generation)
