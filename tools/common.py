"""What commands share."""

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def dispatch(
  command: str,
  what: str,
  names: Mapping[str, str],
  argv: list[str],
  *,
  notes: str,
) -> int:
  """Runs `argenseg COMMAND NAME`, a module of `argenseg_jax.tools.COMMAND`.

  Args:
    command: "bench" or "data".
    what: the first line of its help.
    names: of its sub-commands -> what the help says of each.
    argv: what follows the command.
    notes: the end of its help, with an example.

  Returns:
    The exit code, 2 for bad input.
  """
  if not argv or argv[0] in ("-h", "--help"):
    width = max(map(len, names))
    lines = [f"argenseg {command}: {what}", ""]
    lines += [f"  {name:{width}}  {text}" for name, text in names.items()]
    print("\n".join([*lines, "", notes]))
    return 0
  name, rest = argv[0], argv[1:]
  if name not in names:
    print(
      f"argenseg {command}: unknown sub-command {name!r}; use one of "
      f"{', '.join(names)}.",
      file=sys.stderr,
    )
    return 2
  return importlib.import_module(f"argenseg_jax.tools.{command}.{name}").main(
    rest
  )


def temp_bytes(compiled: Any) -> int:
  """Temporary memory of a compiled JAX program on each device.

  Raises:
    RuntimeError: its compiler does not say.
  """
  memory = compiled.memory_analysis()
  if memory is None:
    raise RuntimeError("this compiler does not report a program's memory.")
  return memory.temp_size_in_bytes


def gib(size: float) -> str:
  """Bytes for people."""
  return f"{size / 2**30:.2f} GiB"
