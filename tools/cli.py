"""`argenseg COMMAND`: one entry point, one module a command."""

import contextlib
import errno
import importlib
import os
import resource
import signal
import sys
import traceback
from typing import TextIO

# Command -> what `argenseg --help` says of it; see `module_of`.
COMMANDS = {
  "quickstart": "from nothing to a trained model and an image of what it does",
  "data": "check, show and pack training data",
  "train": "train an image tokenizer or a model from a config",
  "eval": "measure a checkpoint on a data set",
  "predict": "segment images with a checkpoint",
  "warmup": "compile what predict will need, for later processes too",
  "generate": "draw images for texts",
  "demo": "serve a page in the browser that segments images",
  "plan": "say what a run needs and costs on hardware you do not have",
  "checkpoint": "list, verify, inspect and compare checkpoints",
  "import": "turn PyTorch weights into a checkpoint",
  "export": "turn a checkpoint into PyTorch weights",
  "bench": "measure memory, work and time",
  "parity": "compare with what the authors' code computed",
}
# Their programs are kept on disk when they are called from a shell.
_CACHED = ("eval", "predict", "warmup")
INTERRUPTED = 128 + signal.SIGINT  # Exit code after Ctrl-C, as shells do.
_RERUN = "what was written before is as it was. {}, then rerun the same command"
_SPACE = _RERUN.format("Free up space (or fix the disk)")
# What the system says -> what to do about it.
_REMEDIES = {
  errno.ENOSPC: _SPACE,
  errno.EDQUOT: _SPACE,
  errno.EROFS: _SPACE,
  errno.EIO: _SPACE,
  errno.EFBIG: _RERUN.format("Raise the limit on file sizes (`ulimit -f`)"),
  errno.EACCES: "change its permissions, or give another path",
  errno.EPERM: "change its permissions, or give another path",
  errno.ENOENT: "give a path that exists",
  errno.ENOTDIR: "give another path: a part of this one is a file",
  errno.EEXIST: "give another path: a file of that name is there",
  errno.EISDIR: "give another path: this one is a folder",
  errno.ENAMETOOLONG: "give a shorter path",
  errno.ELOOP: "give another path: symbolic links go around in a circle",
  errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
  errno.ENFILE: "close programs that hold many files open on this machine",
}
_MEMORY = (
  "out of memory ({}); take smaller batches, fewer data.workers or a machine "
  "with more memory (`ulimit -v` may set a limit), then rerun the same command."
)
# Of every command that reads checkpoints.
SKIP = "--skip_verification"


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit code: 2 for bad input and for a machine
  that lacks something, 130 after Ctrl-C, otherwise the command's own."""
  from_shell = argv is None
  argv = list(sys.argv[1:] if argv is None else argv)
  name = argv[0] if argv else "help"
  if from_shell and name in COMMANDS and (said := _too_few_addresses()):
    print(f"argenseg {name}: {said}", file=sys.stderr)
    return 2
  if from_shell and (child := _child_under_a_limit()):
    return _watched(child, name)
  with _lasting_streams() if from_shell else contextlib.nullcontext():
    try:
      code = _main(name, argv[1:], from_shell)
      if from_shell:
        sys.stdout.flush()  # What fails here is said, too.
      return code
    except KeyboardInterrupt:
      said, code = "interrupted.", INTERRUPTED
    except Exception as error:
      said, code = sentence(error), 2
      if not said:
        if _is_several():
          traceback.print_exc()
          _end_all(f"{type(error).__name__}: {error}", 1)
        raise
    print(f"argenseg {name}: {said}", file=sys.stderr)
    _end_all(said, code)
    return code


def _end_all(said: str, code: int) -> None:
  """Ends all processes of a run of several; returns in one that is alone."""
  if _is_several():
    from argenseg_jax.runtime import distributed

    distributed.end_all(said, code)


def _is_several() -> bool:
  """Whether this process has joined others; imports nothing to find out."""
  distributed = sys.modules.get("argenseg_jax.runtime.distributed")
  return distributed is not None and distributed.is_several()


def _too_few_addresses() -> str | None:
  """What is wrong with a `ulimit -v` under which thread pools of the libraries
  cannot start their threads: some end the process, some wait for ever."""
  limit, _ = resource.getrlimit(resource.RLIMIT_AS)
  needed = 3 * 2**30 + (os.cpu_count() or 1) * 2**25
  if limit == resource.RLIM_INFINITY or limit >= needed:
    return None
  return (
    f"`ulimit -v` allows {limit // 1024} KiB of addresses; the libraries "
    f"reserve up to {needed // 1024} KiB on this machine. Raise it, then rerun "
    "the same command (to limit memory itself use a cgroup)."
  )


def _child_under_a_limit() -> int:
  """Starts a process that carries the command out where `ulimit -v` holds,
  so that this one can speak for it: C++ code ends itself without a sentence.

  Returns:
    The process; 0 in itself, and where there is no limit.
  """
  limit, _ = resource.getrlimit(resource.RLIMIT_AS)
  return 0 if limit == resource.RLIM_INFINITY else os.fork()


def _watched(child: int, name: str) -> int:
  """Waits for a process that runs the command; returns its exit code."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # A terminal asks both.
  signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if code >= 0:
    return code
  if -code not in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
    return 128 - code
  said = _MEMORY.format(f"it was ended by {signal.Signals(-code).name}")
  print(f"argenseg {name}: {said}", file=sys.stderr)
  return 2


def _main(name: str, rest: list[str], from_shell: bool) -> int:
  if name in ("-h", "--help", "help"):
    print(_help())
    return 0
  if name == "--version":
    from argenseg_jax.version import __version__

    print(f"argenseg {__version__}")
    return 0
  if name not in COMMANDS:
    print(
      f"argenseg: unknown command {name!r}; use one of {', '.join(COMMANDS)}.",
      file=sys.stderr,
    )
    return 2
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  from absl import logging

  logging.set_verbosity(logging.ERROR)  # Libraries' warnings are not for users.
  from argenseg_jax.checkpoint import manifest

  if from_shell and name in _CACHED:
    from argenseg_jax.runtime import compilation_cache

    compilation_cache.enable()
  rest = [_with_underscores(argument) for argument in rest]
  skips = SKIP in rest
  rest = [argument for argument in rest if argument != SKIP]
  command = importlib.import_module(module_of(name))
  with manifest.unverified() if skips else contextlib.nullcontext():
    return command.main(rest)


def sentence(error: BaseException) -> str | None:
  """What is wrong with the input or this machine and what to do; None for
  errors that are the program's own."""
  if _is_about_memory(error):
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return _MEMORY.format(text or "an allocation failed")
  from argenseg_jax.checkpoint import CheckpointError
  from argenseg_jax.config import ConfigError
  from argenseg_jax.data.errors import DataError

  if isinstance(error, (CheckpointError, ConfigError, DataError)):
    cause = error.__cause__  # A save that fails may fail for lack of memory.
    if cause is not None and _is_about_memory(cause):
      return sentence(cause)
    return str(error)
  if isinstance(error, OSError) and error.errno in _REMEDIES:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; {_REMEDIES[error.errno]}."
  return None


def _is_about_memory(error: BaseException) -> bool:
  """Errors of XLA, threads and the loader are told by their text."""
  if isinstance(error, OSError):
    return error.errno == errno.ENOMEM
  if isinstance(error, MemoryError):
    return True
  signs = (
    *("RESOURCE_EXHAUSTED", "can't start new thread", "bad_alloc"),
    *("failed to map segment", "cannot allocate memory"),
  )
  return isinstance(error, (RuntimeError, ImportError)) and any(
    sign in str(error) for sign in signs
  )


class _Lasting:
  """A stream that goes silent when nobody reads it any more, so that
  `argenseg train | head` trains on."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def __getattr__(self, name: str):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._unread():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._unread():
      self._stream.flush()

  @contextlib.contextmanager
  def _unread(self):
    try:
      yield
    except BrokenPipeError:
      self.silence()

  def silence(self) -> None:
    """Everything that is written from now on is lost, also by libraries."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, self._stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def _lasting_streams():
  """Standard streams that are there and stay: closed ones read and write
  nothing, so that no file gets their numbers."""
  for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
    try:
      os.fstat(number)
    except OSError:  # `os.open` takes the lowest free number: this one.
      os.open(os.devnull, mode)
  sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
  for number, name in ((1, "stdout"), (2, "stderr")):
    stream = getattr(sys, name) or open(number, "w", closefd=False)  # noqa: SIM115
    setattr(sys, name, _Lasting(stream))
  try:
    yield
  finally:
    for name in ("stdout", "stderr"):
      with contextlib.suppress(OSError):
        getattr(sys, name).flush()


def _with_underscores(argument: str) -> str:
  """--a-b=c-d as the flags are spelled, --a_b=c-d."""
  name, equals, value = argument.partition("=")
  if not name.startswith("--") or any(c.isspace() for c in name):
    return argument
  return f"--{name[2:].replace('-', '_')}{equals}{value}"


def module_of(command: str) -> str:
  """tools/COMMAND.py; `import` is a word of the language and gets a tail."""
  name = "import_" if command == "import" else command
  return f"argenseg_jax.tools.{name}"


def _help() -> str:
  width = max(map(len, COMMANDS))
  lines = ["argenseg: image segmentation by generating codes, in JAX.", ""]
  lines += [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
  lines += ["", "`argenseg COMMAND --help` explains a command with an example."]
  lines += [f"{SKIP} reads checkpoints without checking their manifests."]
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
