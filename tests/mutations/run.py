"""Applies each of `mutations.MUTATIONS` to a copy and runs its tests there.

By hand, for minutes:

  python tests/mutations/run.py --out=docs/lab/mutations.md

A process that has imported JAX forks one child for each mutation.
"""

import argparse
import importlib.abc
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
import time

from mutations import MUTATIONS, Mutation  # Beside this script.

ROOT = pathlib.Path(__file__).parents[2]
_PARTS = ("argenseg_jax", "configs", "kernels", "tools", "tests")
_FILES = ("pyproject.toml", "setup.cfg", "CONTRIBUTING.md", "requirements.txt")


class _Copy(importlib.abc.MetaPathFinder):
  """Finds `argenseg_jax` in a copy of the repository."""

  def __init__(self, root: pathlib.Path):
    self._root = root

  def find_spec(self, name, path=None, target=None):
    parts = name.split(".")
    if parts[0] != "argenseg_jax":
      return None
    mapped = len(parts) > 1 and parts[1] in _PARTS
    base = self._root.joinpath(*parts[mapped:])
    if (base / "__init__.py").is_file():
      return importlib.util.spec_from_file_location(
        name, base / "__init__.py", submodule_search_locations=[str(base)]
      )
    if base.with_suffix(".py").is_file():
      return importlib.util.spec_from_file_location(
        name, base.with_suffix(".py")
      )
    return None


def _copied(mutation: Mutation | None, folder: pathlib.Path) -> None:
  ignore = shutil.ignore_patterns("__pycache__")
  for part in _PARTS:
    shutil.copytree(ROOT / part, folder / part, ignore=ignore)
  for name in _FILES:
    shutil.copy(ROOT / name, folder / name)
  if mutation is None:
    return
  path = folder / mutation.path
  text = path.read_text()
  if text.count(mutation.old) != 1:
    times = text.count(mutation.old)
    raise SystemExit(f"{mutation.path} has {mutation.old!r} {times} times.")
  path.write_text(text.replace(mutation.old, mutation.new))


def _passes(tests: tuple[str, ...], folder: pathlib.Path) -> bool:
  """Whether the tests pass in a copy, in a child."""
  child = os.fork()
  if not child:
    code = 3
    try:
      os.chdir(folder)
      sys.meta_path.insert(0, _Copy(folder))
      quiet = os.open(os.devnull, os.O_WRONLY)
      os.dup2(quiet, 1)
      os.dup2(quiet, 2)
      import pytest

      options = ("-n", "0", "-x", "-q", "-p", "no:cacheprovider")
      code = int(pytest.main([*options, *tests]))
    finally:
      os._exit(code)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if code not in (0, 1):
    raise SystemExit(f"pytest ended with {code} on {' '.join(tests)}.")
  return code == 0


def _caught(mutation: Mutation) -> bool:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _copied(mutation, folder)
    return not _passes(mutation.tests, folder)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", help="a Markdown file for the table")
  parser.add_argument("--only", default="", help="part of a mutation's file")
  args = parser.parse_args()
  # As tests/conftest.py has it; what a fork inherits was read before.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  import flax.nnx  # noqa: F401
  import jax  # noqa: F401
  import optax  # noqa: F401

  rows, missed = [], 0
  for mutation in MUTATIONS:
    if args.only not in mutation.path:
      continue
    began = time.monotonic()
    caught = _caught(mutation)
    missed += not caught
    verdict = "caught" if caught else "**missed**"
    cells = (
      mutation.path,
      f"`{mutation.old.strip()}`",
      f"`{mutation.new.strip()}`",
      verdict,
    )
    rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    print(rows[-1], f"{time.monotonic() - began:.0f} s", flush=True)
  print(f"{len(rows) - missed} of {len(rows)} caught")
  if args.out:
    pathlib.Path(args.out).write_text(_page(rows, missed))


def _page(rows: list[str], missed: int) -> str:
  return "\n".join(
    (
      "# Mutations",
      "",
      "Lines made wrong one at a time, in a copy, and whether a test of their",
      "area noticed. `python tests/mutations/run.py` does it again; the tests",
      "of each stand in `tests/mutations/mutations.py`.",
      "",
      f"{len(rows) - missed} of {len(rows)} are caught.",
      "",
      "| file | line | made | |",
      "|---|---|---|---|",
      *rows,
      "",
    )
  )


if __name__ == "__main__":
  main()
