"""Ctrl-C is for the main process; workers go on until it ends them."""

import multiprocessing
import signal

from argenseg_jax.data import worker_signals


def test_a_worker_ignores_ctrl_c(monkeypatch):
  monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
  before = signal.getsignal(signal.SIGINT)
  try:
    worker_signals.leave_ctrl_c_to_main()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)


def test_the_main_process_does_not():
  before = signal.getsignal(signal.SIGINT)
  worker_signals.leave_ctrl_c_to_main()
  assert signal.getsignal(signal.SIGINT) is before
