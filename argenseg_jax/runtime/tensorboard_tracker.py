"""Metrics for TensorBoard."""

import contextlib
import os
import socket
import struct
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from argenseg_jax.runtime.tracker import Tracked, Tracker


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """tensorboardX imports torch if it can: seconds, for nothing."""
  if "torch" in sys.modules:
    yield
    return
  sys.modules["torch"] = cast(types.ModuleType, None)  # Not to be imported.
  try:
    yield
  finally:
    del sys.modules["torch"]


class TensorBoard(Tracker):
  """TensorBoard's event file, in the folder `tensorboard`.

  tensorboardX writes it from a thread. When that one dies, of a full disk for
  example, its queue fills up and the run waits for ever; so this writes itself.
  """

  title = "TensorBoard"

  def __init__(self, run: Tracked):
    folder = run.logs / "tensorboard"
    with _without_torch():
      from tensorboardX import record_writer, summary
      from tensorboardX.proto import event_pb2

    made: Any = event_pb2  # Its classes are made when it is imported.
    self._event, self._scalar = made.Event, summary.scalar
    self._check = record_writer.masked_crc32c
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}"
    self._path = folder / name
    self._append([self._event(wall_time=now, file_version="brain.Event:2")])
    if run.start is not None:  # Readers drop the steps after it.
      began = made.SessionLog(status=made.SessionLog.START)
      self._append(
        [self._event(wall_time=now, step=run.start + 1, session_log=began)]
      )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    now = time.time()
    self._append(
      self._event(wall_time=now, step=step, summary=self._scalar(name, value))
      for name, value in values.items()
    )

  def close(self) -> None:
    """Everything is written already."""

  def _append(self, events: Iterable[Any]) -> None:
    with self._path.open("ab") as file:
      for event in events:
        data = event.SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):
          file.write(part + struct.pack("<I", self._check(part)))
