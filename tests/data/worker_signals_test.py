"""Ctrl-C is for the main process; workers go on until it ends them."""

import multiprocessing
import signal

import tiny_rows

from argenseg_jax.data import worker_signals


def _handler(rows) -> bool:
  del rows  # Unpickled here.
  return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_workers_that_have_rows_ignore_ctrl_c(tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path)
  context = multiprocessing.get_context("spawn")
  with context.Pool(1) as pool:
    assert pool.apply(_handler, (rows,))


def test_the_main_process_does_not():
  before = signal.getsignal(signal.SIGINT)
  worker_signals.leave_ctrl_c_to_main()
  assert signal.getsignal(signal.SIGINT) is before
