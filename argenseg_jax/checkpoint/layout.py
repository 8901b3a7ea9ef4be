"""Where a work directory keeps its checkpoints and what they need.

A task's folder holds `checkpoints/STEP/` and, beside them, `tokenizer.json` and
the files that import has kept. The only module that knows these names.
"""

import functools
import sys
from collections.abc import Iterable

from argenseg_jax.checkpoint import manifest
from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path

DAMAGED = "damaged_checkpoints"  # In a work directory: steps put aside.
_STEPS = "checkpoints"  # In a work directory: steps.
_TOKENIZER = "tokenizer.json"  # In a work directory.
_LAST = "commit_success.txt"
KEPT = "torch"  # In a work directory: files of a PyTorch folder, for export.


class CheckpointError(ValueError):
  """A checkpoint that cannot be used; the message says which and why."""


def step_directory(path: str | Path) -> Path:
  """The newest undamaged step under a work directory or checkpoint directory; a
  step directory itself.

  Raises:
    CheckpointError: nothing there is a checkpoint, or none is undamaged.
  """
  root = paths.absolute(paths.as_path(path))
  if not root.exists():
    raise CheckpointError(f"checkpoint {path} does not exist.")
  if _is_named_as_step(root) or (root / "meta").is_dir():
    if manifest.faults(root):
      raise CheckpointError(
        f"{damage(root)}; use another step, or read it as it is with "
        "--skip_verification."
      )
    return root
  for directory in (steps_directory(root), root):
    if directory.is_dir():
      steps = [d for d in directory.iterdir() if is_step(d)]
      for step in sorted(steps, key=step_number, reverse=True):
        if not manifest.faults(step):
          return step
        warn(f"{damage(step)}; looking for an older one.")
      if steps:
        raise CheckpointError(every_is_damaged(directory))
  raise CheckpointError(
    f"{path} contains no checkpoint; give a work directory of `argenseg train` "
    "or `argenseg quickstart`, or one of its checkpoints/STEP directories."
  )


def steps_below(path: Path) -> list[Path]:
  """Every step under a directory, also those of several tasks, in order; a step
  directory itself.

  Raises:
    CheckpointError: there is none.
  """
  if not path.exists():
    raise CheckpointError(f"checkpoint {path} does not exist.")
  if _is_named_as_step(path):
    return [path]
  found = [*path.glob("*")]
  if paths.is_local(path):
    found += path.rglob(f"{_STEPS}/*")
  else:  # A bucket is not asked for every name below one.
    found += [*path.glob(f"{_STEPS}/*"), *path.glob(f"*/{_STEPS}/*")]
  found = list(filter(is_step, found))
  if not found:
    raise CheckpointError(f"{path} contains no checkpoint.")
  return sorted(found, key=lambda d: (d.parent, step_number(d)))


def newest_steps(workdir: Path, tasks: Iterable[str]) -> dict[str, int]:
  """The newest step of each task that has one, damaged or not."""
  found = {}
  for task in tasks:
    directory = steps_directory(workdir / task)
    if directory.is_dir():
      numbers = [step_number(d) for d in directory.iterdir() if is_step(d)]
      if numbers:
        found[task] = max(numbers)
  return found


def steps_directory(workdir: Path) -> Path:
  """Where the steps of a task's work directory are."""
  return workdir / _STEPS


def step_number(step: Path) -> int:
  return int(step.name)


def workdir_of(step: Path) -> Path:
  """The work directory that a step is in, where it was not copied alone."""
  return step.parent.parent


def is_step(directory: Path) -> bool:
  """Whether it was written to its end: it has its final name, and in a bucket,
  where Orbax renames nothing, what Orbax writes last."""
  return _is_named_as_step(directory) and (
    paths.is_local(directory) or (directory / _LAST).exists()
  )


def _is_named_as_step(directory: Path) -> bool:
  return directory.name.isascii() and directory.name.isdigit()


def damage(step: Path) -> str:
  found = manifest.faults(step)
  more = f" and {len(found) - 2} more" if len(found) > 2 else ""
  return f"checkpoint {step} is damaged: {', '.join(found[:2])}{more}"


def every_is_damaged(directory: Path) -> str:
  return (
    f"every checkpoint in {directory} is damaged (`argenseg checkpoint verify` "
    "lists the faults); put a good copy there or use another directory."
  )


@functools.cache  # Once each.
def warn(sentence: str) -> None:
  print(sentence, file=sys.stderr, flush=True)


def text_tokenizer_path(step: Path) -> Path:
  """The tokenizer.json that lies beside the checkpoints of a work directory."""
  return workdir_of(step) / _TOKENIZER


def kept_files(step: Path) -> Path:
  """Where import keeps the files of a PyTorch folder; it may be absent."""
  return workdir_of(step) / KEPT


def beside(step: Path) -> dict[str, Path]:
  """The files of its work directory that a step needs, by name."""
  found, kept = {}, kept_files(step)
  if text_tokenizer_path(step).is_file():
    found[_TOKENIZER] = text_tokenizer_path(step)
  if kept.is_dir():
    found |= {f"{KEPT}/{name}": kept / name for name in paths.tree(kept)}
  return found


def require_unchanged(step: Path, name: str = "") -> None:
  """Raises CheckpointError where files beside a step, or those below `name`,
  are not those that it was saved with."""
  chosen = {n: p for n, p in beside(step).items() if n.startswith(name)}
  if found := manifest.faults_beside(step, chosen):
    raise CheckpointError(
      f"checkpoint {step}: {found[0]} since it was saved; put the original "
      "back, or use what is there with --skip_verification."
    )
