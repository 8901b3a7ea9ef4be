"""Ctrl-C is for the main process; workers go on until it ends them."""

import multiprocessing
import signal

import tiny_rows

from argenseg_jax.data import worker_signals


def test_workers_that_have_rows_ignore_ctrl_c(tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path)
  context = multiprocessing.get_context("spawn")
  with context.Pool(1) as pool:
    # Functions of libraries: the worker cannot import a test.
    assert pool.apply(isinstance, (rows, object))  # Unpickled there.
    handler = pool.apply(signal.getsignal, (signal.SIGINT,))
  assert handler is signal.SIG_IGN


def test_the_main_process_does_not():
  before = signal.getsignal(signal.SIGINT)
  worker_signals.leave_ctrl_c_to_main()
  assert signal.getsignal(signal.SIGINT) is before
