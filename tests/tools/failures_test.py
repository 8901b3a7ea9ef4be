"""What a machine lacks, Ctrl-C and streams that nobody reads: no traceback."""

import errno
import os
import subprocess
import sys

import jax
import pytest

from argenseg_jax.checkpoint import CheckpointError
from argenseg_jax.tools import checkpoint as command
from argenseg_jax.tools import cli


def _fail(monkeypatch, error):
  def main(argv):
    raise error

  monkeypatch.setattr(command, "main", main)


def _os_error(number):
  return OSError(number, os.strerror(number), "/some/file")


def _caused(cause):
  error = CheckpointError("cannot write. Free up space.")
  error.__cause__ = cause
  return error


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (_os_error(errno.ENOSPC), "Free up space (or fix the disk), then rerun"),
    (_os_error(errno.EFBIG), "ulimit -f"),
    (_os_error(errno.EACCES), "change its permissions"),
    (_os_error(errno.ENOTDIR), "a part of this one is a file"),
    (_os_error(errno.EEXIST), "a file of that name is there"),
    (_os_error(errno.EISDIR), "this one is a folder"),
    (_os_error(errno.EMFILE), "ulimit -n"),
    (_os_error(errno.ENAMETOOLONG), "give a shorter path"),
    (_os_error(errno.ENOMEM), "out of memory"),
    (MemoryError(), "out of memory (an allocation failed)"),
    (MemoryError("Unable to allocate 9 TiB"), "(Unable to allocate 9 TiB)"),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
      "(RESOURCE_EXHAUSTED: Out of memory); take smaller batches",
    ),
    (RuntimeError("can't start new thread"), "out of memory"),
    (ImportError("x.so: failed to map segment from shared"), "out of memory"),
    (_caused(RuntimeError("can't start new thread")), "out of memory"),
  ],
)
def test_what_a_machine_lacks_is_one_sentence(error, said, monkeypatch, capsys):
  _fail(monkeypatch, error)
  assert cli.main(["checkpoint"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("argenseg checkpoint: ")
  assert said in line
  if isinstance(error, OSError) and error.errno != errno.ENOMEM:
    assert "/some/file: " in line


@pytest.mark.parametrize(
  "error", [RuntimeError("a fault of ours"), OSError("no number"), KeyError(1)]
)
def test_faults_of_the_program_keep_their_traceback(error, monkeypatch):
  _fail(monkeypatch, error)
  with pytest.raises(type(error)):
    cli.main(["checkpoint"])


def test_ctrl_c_is_one_line(monkeypatch, capsys):
  _fail(monkeypatch, KeyboardInterrupt())
  assert cli.main(["checkpoint"]) == 130
  assert capsys.readouterr().err == "argenseg checkpoint: interrupted.\n"


# Says much, then writes a file: its work is not lost.
_TALKS = """
import sys
from argenseg_jax.tools import checkpoint, cli
def main(argv):
  for _ in range(20_000):
    print("a line of a log")
  with open(sys.argv[2], "w") as file:
    file.write("done")
  with open(sys.argv[2] + ".fd", "w") as file:
    file.write(str(file.fileno()))
  return 0
checkpoint.main = main
sys.exit(cli.main())
"""


def _talk(shell, path):
  """Runs it as `checkpoint PATH` in a shell, `$TALK` being the command."""
  return subprocess.run(
    ["bash", "-c", shell],
    env=os.environ
    | {"TALK": f"{sys.executable} -c '{_TALKS}' checkpoint {path}"},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  "shell",
  [
    'eval "$TALK" | head -1; exit ${PIPESTATUS[0]}',
    'eval "$TALK" >&-',
    'eval "$TALK" <&- >&- 2>&-',
  ],
)
def test_what_nobody_reads_costs_no_work(shell, tmp_path):
  path = tmp_path / "out"
  ran = _talk(shell, path)
  assert ran.returncode == 0, ran.stderr
  assert ran.stderr == ""
  assert path.read_text() == "done"
  # No file got the number of a standard stream.
  assert int((tmp_path / "out.fd").read_text()) > 2


_ENDS = """
import os, signal, sys
from argenseg_jax.tools import checkpoint, cli
def main(argv):
  if argv[0] == "returns":
    return 7
  os.kill(os.getpid(), getattr(signal, argv[0]))
  signal.pause()
checkpoint.main = main
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
  ("how", "code", "said"),
  [
    ("SIGABRT", 2, "out of memory (it was ended by SIGABRT); take smaller"),
    ("returns", 7, ""),
  ],
)
def test_what_ends_without_a_word_under_a_limit_is_said(how, code, said):
  """C++ code ends itself where `ulimit -v` gives it no more memory."""
  ran = subprocess.run(
    [
      *("bash", "-c", 'ulimit -v 50000000; exec "$@"', "bash"),
      *(sys.executable, "-c", _ENDS, "checkpoint", how),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == code, ran.stderr
  assert said in ran.stderr.splitlines()[-1] if said else not ran.stderr


def test_a_limit_that_libraries_wait_under_for_ever_is_refused():
  ran = subprocess.run(
    [
      *("bash", "-c", 'ulimit -v 1500000; exec "$@"', "bash"),
      *(sys.executable, "-m", "argenseg_jax.tools.cli", "data", "check"),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == 2, ran.stderr
  assert "`ulimit -v` allows 1500000 KiB of addresses" in ran.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_behind_stdout_is_said(tmp_path):
  ran = _talk('eval "$TALK" > /dev/full', tmp_path / "out")
  assert ran.returncode == 2
  (line,) = ran.stderr.splitlines()
  assert "No space left on device" in line


def test_a_work_directory_that_is_a_file_is_named(tmp_path, request, capsys):
  config = request.config.rootpath / "configs" / "tiny.py"
  (tmp_path / "file").touch()
  for workdir in ("file", "file/below"):
    arguments = [f"--config={config}", "--config.data.path=x"]
    code = cli.main(["train", *arguments, f"--workdir={tmp_path / workdir}"])
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line


_SAVES = """
import resource, sys
import jax.numpy as jnp
from flax import nnx
from argenseg_jax.checkpoint import Checkpoints
from argenseg_jax.tools import checkpoint, cli
def main(argv):
  state = nnx.State({f"k{i}": nnx.Param(jnp.arange(1e5)) for i in range(20)})
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
  checkpoints = Checkpoints(argv[0])
  try:
    checkpoints.save(1, state, (jnp.zeros(2),), {})
    checkpoints.wait()
  finally:
    checkpoints.close()
checkpoint.main = main
sys.exit(cli.main())
"""


def test_a_save_that_fails_is_one_line(tmp_path):
  """Orbax and TensorStore printed hundreds of tracebacks behind it."""
  ran = subprocess.run(
    [sys.executable, "-c", _SAVES, "checkpoint", str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == 2, ran.stderr
  # JAX's compilers may have said something before.
  assert "Traceback" not in ran.stderr
  assert "Task " not in ran.stderr
  line = ran.stderr.splitlines()[-1]
  assert "checkpoints/1: File too large; earlier ones are as they were" in line
