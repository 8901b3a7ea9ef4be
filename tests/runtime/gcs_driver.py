"""Runs `argenseg` commands, one a line of JSON on stdin, in one process.

Clients of buckets keep their settings for the life of a process, so what talks
to the emulator does not share one with other tests.
"""

import contextlib
import io
import json
import os
import sys

from argenseg_jax.tools import cli


def main() -> None:
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      code = cli.main(json.loads(line))
    answers.write(json.dumps([code, said.getvalue()]) + "\n")
    answers.flush()


if __name__ == "__main__":
  main()
