"""SIGTERM: a run ends with a complete checkpoint, within its grace time.

A run asks between steps and between batches of an evaluation. Where it cannot
ask, because it compiles or writes, a thread of its own watches the clock.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax

from argenseg_jax import distributed

INTERRUPTED = 3  # Exit code of a run that was told to stop and has saved.
_active: list["Stopping"] = []


class Interrupted(Exception):
  """SIGTERM came; everything is saved."""


@contextlib.contextmanager
def listening(grace_seconds: float) -> Iterator["Stopping"]:
  """Listens to SIGTERM; within another call, that one's listener is used.

  Args:
    grace_seconds: after so many the process ends with code 3 wherever it is,
      and the last complete checkpoint counts; 0 never does that.
  """
  if _active:
    yield _active[0]
    return
  stopping = Stopping()
  _active.append(stopping)
  try:
    if threading.current_thread() is threading.main_thread():
      with _handled(stopping, grace_seconds):
        yield stopping
    else:  # Nobody sends signals to other threads.
      yield stopping
  finally:
    _active.clear()


class Stopping:
  """Whether this run was told to stop."""

  def __init__(self) -> None:
    self._told = False
    self._polls = 0
    self._agreed = False
    self._raises = False

  def requested(self) -> bool:
    """SIGTERM came here or, of several processes, to any.

    All of them must ask equally often; they get the same answer.
    """
    if jax.process_count() == 1:
      return self._told
    self._polls += 1
    self._agreed = self._agreed or distributed.stop_requested(self._polls)
    return self._agreed

  def check(self) -> None:
    """Raises Interrupted if `requested`."""
    if self.requested():
      raise Interrupted("stopped on request; a later call goes on.")

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Within it, SIGTERM to a single process raises Interrupted at once."""
    self._raises = jax.process_count() == 1
    try:
      if self._told and self._raises:
        raise Interrupted("stopped on request.")
      yield
    finally:
      self._raises = False

  def told(self, *_) -> None:
    """What Python calls on SIGTERM, once its main thread is at leisure."""
    self._told = True
    if self._raises:
      self._raises = False
      raise Interrupted("stopped on request.")


@contextlib.contextmanager
def _handled(stopping: Stopping, grace_seconds: float) -> Iterator[None]:
  """Handles SIGTERM; JAX, if it listens already, goes on hearing of it."""
  theirs = _take_over() if jax.process_count() > 1 else None
  before = signal.signal(signal.SIGTERM, stopping.told)
  # Python's handlers wait for its main thread; this pipe does not.
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  left = threading.Event()

  def watch():
    while number := os.read(reader, 1):
      if number[0] != signal.SIGTERM:
        continue
      if theirs is not None:
        theirs(signal.SIGTERM)
      if grace_seconds and not left.wait(grace_seconds):
        print(
          f"argenseg: SIGTERM came {grace_seconds:g} s ago and the run is in "
          "the middle of something; it ends here, a later call goes on from "
          "the last complete checkpoint.",
          file=sys.stderr,
          flush=True,
        )
        os._exit(INTERRUPTED)

  thread = threading.Thread(target=watch, name="sigterm", daemon=True)
  thread.start()
  try:
    yield
  finally:
    left.set()
    signal.set_wakeup_fd(fd_before)
    if theirs is None:
      signal.signal(signal.SIGTERM, before)
    else:
      _set_handler(signal.SIGTERM, ctypes.cast(theirs, ctypes.c_void_p))
    os.close(writer)  # Ends the thread.
    thread.join()
    os.close(reader)


_set_handler = ctypes.CDLL(None).signal
_set_handler.restype = ctypes.c_void_p
_set_handler.argtypes = ctypes.c_int, ctypes.c_void_p


def _take_over():
  """The C function that handled SIGTERM so far, None if there was none."""
  address = _set_handler(signal.SIGTERM, None)  # None: the system's default.
  if not address or address == 1:
    return None
  return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
