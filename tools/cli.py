"""`argenseg COMMAND`: one entry point, one module a command."""

import contextlib
import errno
import importlib
import os
import sys

# Command -> what `argenseg --help` says of it; see `module_of`.
COMMANDS = {
  "quickstart": "from nothing to a trained model and a picture of what it does",
  "data": "check, show and pack training data",
  "train": "train an image tokenizer or a model from a config",
  "eval": "measure a checkpoint on a data set",
  "predict": "segment pictures with a checkpoint",
  "warmup": "compile what predict will need, for later processes too",
  "generate": "draw images for texts",
  "demo": "serve a page in the browser that segments images",
  "plan": "say what a run needs and costs on hardware that is not here",
  "checkpoint": "list, verify, inspect and compare checkpoints",
  "import": "turn PyTorch weights into a checkpoint",
  "export": "turn a checkpoint into PyTorch weights",
  "bench": "measure memory, work and time",
  "parity": "compare with what the authors' code computed",
}
# Their programs are kept on disk when they are called from a shell.
_CACHED = ("eval", "predict", "warmup")
# What a disk says that takes no more.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Of every command that reads checkpoints.
SKIP = "--skip_verification"


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit code (2 for bad input)."""
  from_shell = argv is None
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_help())
    return 0
  name, rest = argv[0], argv[1:]
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
  from argenseg_jax.checkpoint import CheckpointError, manifest
  from argenseg_jax.config import ConfigError
  from argenseg_jax.data.errors import DataError

  if from_shell and name in _CACHED:
    from argenseg_jax.runtime import compilation_cache

    compilation_cache.enable()
  command = importlib.import_module(module_of(name))
  skips = SKIP in rest
  rest = [argument for argument in rest if argument != SKIP]
  try:
    with manifest.unverified() if skips else contextlib.nullcontext():
      return command.main(rest)
  except (CheckpointError, ConfigError, DataError) as error:
    print(f"argenseg {name}: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    if error.errno not in _DISK:
      raise
    where = f"cannot write {error.filename}" if error.filename else "writing"
    print(
      f"argenseg {name}: {where}: {error.strerror}; what was written before is "
      "as it was. Make room or mend the disk and start again.",
      file=sys.stderr,
    )
    return 2


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
