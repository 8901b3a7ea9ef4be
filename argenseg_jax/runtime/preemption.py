"""SIGTERM and Ctrl-C: a run ends with a complete checkpoint, within its grace
time; a second Ctrl-C ends it at once.

A run asks between steps and between batches of an evaluation. Where it cannot
ask, because it compiles or writes, a thread of its own watches the clock. Of
several processes JAX listens for each and agrees on a step.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from argenseg_jax.runtime import distributed

INTERRUPTED = 3  # Exit code of a run that was told to stop and has saved,
CTRL_C = 128 + signal.SIGINT  # and of one that Ctrl-C told, as shells do.
_active: list["Stopping"] = []


class Interrupted(Exception):
  """SIGTERM or Ctrl-C came; everything is saved.

  Attributes:
    code: exit code for the process.
  """

  def __init__(self, said: str):
    super().__init__(said)
    self.code = _active[0].code if _active else INTERRUPTED


@contextlib.contextmanager
def listening(grace_seconds: float) -> Iterator["Stopping"]:
  """Listens to SIGTERM; within another call, that one's listener is used.

  Args:
    grace_seconds: after so many every process of the run ends with code 3
      wherever it is, and the last complete checkpoint counts; 0 never does
      that. Several processes need four of them to hear of it and to end.
  """
  if _active:
    yield _active[0]
    return
  stopping = Stopping()
  _active.append(stopping)
  try:
    # Only the main thread may handle signals.
    main = threading.current_thread() is threading.main_thread()
    if jax.process_count() > 1:
      with contextlib.ExitStack() as stack:
        if main:
          stack.enter_context(_ctrl_c_is_sigterm(stopping))
        if grace_seconds:
          stack.enter_context(_noticed(grace_seconds))
        yield stopping
    elif main and jax.process_count() == 1:
      with _handled(stopping, grace_seconds):
        yield stopping
    else:
      yield stopping
  finally:
    _active.clear()


class Stopping:
  """Whether this run was told to stop."""

  def __init__(self) -> None:
    self.code = INTERRUPTED
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
      raise Interrupted("stopped on request; the same command resumes.")

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Within it, a signal to a single process raises Interrupted at once."""
    self._raises = jax.process_count() == 1
    try:
      if self._told and self._raises:
        raise Interrupted("stopped on request.")
      yield
    finally:
      self._raises = False

  def told(self, number: int = signal.SIGTERM, *_) -> None:
    """What Python calls on a signal, once its main thread is at leisure."""
    self._told = True
    if number == signal.SIGINT:
      self.code = CTRL_C
    if self._raises:
      self._raises = False
      raise Interrupted("stopped on request.")


@contextlib.contextmanager
def _handled(stopping: Stopping, grace_seconds: float) -> Iterator[None]:
  """Handles both signals in a single process, and ends it after its grace time
  or a second Ctrl-C."""
  before = {
    number: signal.signal(number, stopping.told)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  # Python's handlers wait for its main thread; this pipe does not.
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  left = threading.Event()

  def end_in_time(name: str, code: int) -> None:
    if not left.wait(grace_seconds or None):
      _end(grace_seconds, name, code)

  def watch():
    told = False
    while number := os.read(reader, 1):
      is_ctrl_c = number[0] == signal.SIGINT
      if is_ctrl_c and told and not left.is_set():
        os._exit(CTRL_C)
      if is_ctrl_c or number[0] == signal.SIGTERM:
        told = told or is_ctrl_c
        given = ("Ctrl-C", CTRL_C) if is_ctrl_c else ("SIGTERM", INTERRUPTED)
        threading.Thread(target=end_in_time, args=given, daemon=True).start()

  thread = threading.Thread(target=watch, name="signals", daemon=True)
  thread.start()
  try:
    yield
  finally:
    left.set()
    signal.set_wakeup_fd(fd_before)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(writer)  # Ends the thread.
    thread.join()
    os.close(reader)


@contextlib.contextmanager
def _ctrl_c_is_sigterm(stopping: Stopping) -> Iterator[None]:
  """Of several processes JAX hears SIGTERM only; a second Ctrl-C ends this."""

  def handle(number: int, *_) -> None:
    if stopping.code == CTRL_C:
      os._exit(CTRL_C)
    stopping.told(number)
    os.kill(os.getpid(), signal.SIGTERM)

  before = signal.signal(signal.SIGINT, handle)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _noticed(grace_seconds: float) -> Iterator[None]:
  """Ends each of several processes when the grace time of one is over.

  JAX's listener has the signal, without a handler of ours: hosts that do not
  hear it from JAX do not agree on a step. So a thread looks for what it has
  told all hosts, which it does within two seconds.
  """
  # JAX ends the others with another code once process 0 is gone.
  patience = max(grace_seconds - 2 * _APART, 0)
  patience += _APART if distributed.is_main() else 0
  ends_at = float("inf")
  left = threading.Event()

  def watch():
    nonlocal ends_at
    while not distributed.stop_noticed():
      if left.wait(_LOOKS_EVERY):
        return
    ends_at = time.monotonic() + patience
    if not left.wait(patience):
      _end(patience)

  thread = threading.Thread(target=watch, name="sigterm", daemon=True)
  thread.start()
  try:
    yield
  except Interrupted:
    raise
  except Exception:
    # Hosts that were first are gone, and what waits for them fails.
    if time.monotonic() > ends_at - 2 * _APART:
      traceback.print_exc()
      thread.join()
    raise
  finally:
    left.set()
    thread.join()


_LOOKS_EVERY = 1.0  # Seconds, as JAX does.
_APART = 2.0  # Hosts hear of a signal so late, and begin to count so far apart.


def _end(
  seconds: float, name: str = "SIGTERM", code: int = INTERRUPTED
) -> None:
  print(
    f"argenseg: {name} came {seconds:g} s ago and the run is in the middle of "
    "something; it ends here. The same command resumes from the last complete "
    "checkpoint.",
    file=sys.stderr,
    flush=True,
  )
  os._exit(code)
