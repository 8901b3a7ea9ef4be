"""A folder of a bucket, written as if it were on a disk.

An object of a bucket cannot be appended to. So logs are written on a disk of
this machine and copied whole, every now and then and at the end.
"""

import contextlib
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path

_EVERY = 30.0  # Seconds between two copies of what has changed.


@contextlib.contextmanager
def on_disk(
  folder: Path, goes_on: Sequence[str], *, every: float = _EVERY
) -> Iterator[pathlib.Path]:
  """The folder itself if it is on a disk, else one whose files are copied to
  it. What a kill leaves uncopied is lost.

  Args:
    folder: of logs.
    goes_on: patterns of the files that an earlier call may have begun.
    every: seconds between two copies.
  """
  if paths.is_local(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="argenseg-") as scratch:
    mirror = _Mirror(folder, pathlib.Path(scratch))
    mirror.fetch(goes_on)
    closed = threading.Event()

    def copy():
      while not closed.wait(every):
        mirror.send()

    thread = threading.Thread(target=copy, name="mirror", daemon=True)
    thread.start()
    try:
      yield mirror.scratch
    finally:
      closed.set()
      thread.join()
      mirror.send()


class _Mirror:
  """Knows what of `scratch` the bucket has."""

  def __init__(self, folder: Path, scratch: pathlib.Path):
    self._folder, self.scratch = folder, scratch
    self._sent: dict[str, paths.Entry] = {}

  def fetch(self, patterns: Sequence[str]) -> None:
    for pattern in patterns:
      for path in self._folder.glob(pattern):
        target = self.scratch / path.relative_to(self._folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        paths.copy(path, target)
    self._sent = paths.tree(self.scratch)

  def send(self) -> None:
    for name, entry in paths.tree(self.scratch).items():
      if self._sent.get(name) == entry:
        continue
      try:
        paths.copy(self.scratch / name, self._folder / name)
        self._sent[name] = entry
      except Exception as error:  # A run is worth more than its log.
        print(
          f"{self._folder / name} is not written: {paths.said(error)}",
          file=sys.stderr,
          flush=True,
        )
