"""Which step is read, and where its work directory keeps other files."""

import functools
import pathlib
import sys

from argenseg_jax import integrity

DAMAGED = "damaged_checkpoints"  # In a work directory: steps put aside.
KEPT = "torch"  # In a work directory: files of a PyTorch folder, for export.


class CheckpointError(ValueError):
  """A checkpoint that cannot be used; the message says which and why."""


def step_directory(path: str | pathlib.Path) -> pathlib.Path:
  """The newest undamaged step under a work directory or checkpoint directory; a
  step directory itself.

  Raises:
    CheckpointError: nothing there is a checkpoint, or none is undamaged.
  """
  root = pathlib.Path(path).absolute()
  if not root.exists():
    raise CheckpointError(f"checkpoint {path} does not exist.")
  if root.name.isdigit() or (root / "meta").is_dir():
    if integrity.faults(root):
      raise CheckpointError(
        f"{damage(root)}; use another step, or read it as it is with "
        "--skip_verification."
      )
    return root
  for directory in (root / "checkpoints", root):
    if directory.is_dir():
      steps = [d for d in directory.iterdir() if d.name.isdigit()]
      for step in sorted(steps, key=lambda d: int(d.name), reverse=True):
        if not integrity.faults(step):
          return step
        warn(f"{damage(step)}; looking for an older one.")
      if steps:
        raise CheckpointError(every_is_damaged(directory))
  raise CheckpointError(
    f"{path} holds no checkpoint; give a work directory of `argenseg train` or "
    "`argenseg quickstart`, or one of its checkpoints/STEP directories."
  )


def damage(step: pathlib.Path) -> str:
  found = integrity.faults(step)
  more = f" and {len(found) - 2} more" if len(found) > 2 else ""
  return f"checkpoint {step} is damaged: {', '.join(found[:2])}{more}"


def every_is_damaged(directory: pathlib.Path) -> str:
  return (
    f"every checkpoint in {directory} is damaged (`argenseg checkpoint verify` "
    "lists the faults); put a good copy there or use another directory."
  )


@functools.cache  # Once each.
def warn(sentence: str) -> None:
  print(sentence, file=sys.stderr, flush=True)


def text_tokenizer_path(step: pathlib.Path) -> pathlib.Path:
  """The tokenizer.json that lies beside the checkpoints of a work directory."""
  return step.parent.parent / "tokenizer.json"


def kept_files(step: pathlib.Path) -> pathlib.Path:
  """Where import keeps the files of a PyTorch folder; it may be absent."""
  return step.parent.parent / KEPT
