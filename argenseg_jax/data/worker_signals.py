"""Ctrl-C goes to every process of a terminal; the main one decides."""

import contextlib
import multiprocessing
import signal


def leave_ctrl_c_to_main() -> None:
  """In a worker process, ignores SIGINT from now on; else does nothing.

  The main process saves, with batches that workers still make, and ends them.
  """
  if multiprocessing.parent_process() is not None:
    with contextlib.suppress(ValueError):  # Not the main thread.
      signal.signal(signal.SIGINT, signal.SIG_IGN)
