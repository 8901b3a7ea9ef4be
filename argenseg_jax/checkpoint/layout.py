"""Which step is read, and where its work directory keeps other files."""

import functools
import sys

from argenseg_jax.checkpoint import manifest
from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path

DAMAGED = "damaged_checkpoints"  # In a work directory: steps put aside.
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
  if root.name.isdigit() or (root / "meta").is_dir():
    if manifest.faults(root):
      raise CheckpointError(
        f"{damage(root)}; use another step, or read it as it is with "
        "--skip_verification."
      )
    return root
  for directory in (root / "checkpoints", root):
    if directory.is_dir():
      steps = [d for d in directory.iterdir() if is_step(d)]
      for step in sorted(steps, key=lambda d: int(d.name), reverse=True):
        if not manifest.faults(step):
          return step
        warn(f"{damage(step)}; looking for an older one.")
      if steps:
        raise CheckpointError(every_is_damaged(directory))
  raise CheckpointError(
    f"{path} holds no checkpoint; give a work directory of `argenseg train` or "
    "`argenseg quickstart`, or one of its checkpoints/STEP directories."
  )


def is_step(directory: Path) -> bool:
  """Whether it was written to its end: it has its final name, and in a bucket,
  where Orbax renames nothing, what Orbax writes last."""
  return directory.name.isdigit() and (
    paths.is_local(directory) or (directory / _LAST).exists()
  )


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
  return step.parent.parent / "tokenizer.json"


def kept_files(step: Path) -> Path:
  """Where import keeps the files of a PyTorch folder; it may be absent."""
  return step.parent.parent / KEPT
