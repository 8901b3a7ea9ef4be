"""A work directory belongs to one config and to one run at a time."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any, get_args

from argenseg_jax import config_parsing
from argenseg_jax.config import (
  SPEED_KEYS,
  ConfigError,
  RLConfig,
  RunConfig,
  TaskName,
)
from argenseg_jax.runtime import distributed, lock, paths
from argenseg_jax.runtime.paths import Path, is_local

# Of reinforcement learning alone; `kl` decides what a checkpoint holds.
_RL_KEYS = tuple(
  field.name
  for field in dataclasses.fields(RLConfig)
  if field.name not in ("optimizer", "train", "kl")
)
# What a resumed run may have otherwise than before, by dotted key; stages are
# "*". Keys that stand nowhere here may not change.
_FREE = (  # They change no number that is learned.
  *(f"data.{key}" for key in SPEED_KEYS),
  "eval.batch_size",
  "mesh.*",
  "tracking.*",
  "*.train.accumulate_steps",
  "*.train.remat",
  *(f"*.train.{key}_every" for key in ("log", "eval", "save", "keep")),
  *(f"*.train.{key}" for key in ("keep", "keep_best", "best_by")),
  *(f"*.train.{key}" for key in ("grace_seconds", "stall_factor")),
  "*.train.max_skipped",
  *(f"*.train.profile_{key}" for key in ("steps", "processes")),
)
_ACCEPTED = {  # With a flag.
  "--accept_changed_data": ("data.*", "*.train.global_batch_size"),
  "--change_settings": (
    "eval.*",
    "loss.*",
    "tokenizer_training.*",
    "*.train.steps",
    "*.train.compute_dtype",
    "*.optimizer.*",
    *(f"*.{key}" for key in _RL_KEYS),
  ),
}
# They decide what arrays a checkpoint holds.
_FIXED = (
  "*.optimizer.name",
  "*.optimizer.frozen",
  "*.optimizer.ema_decay",
)
_STAGES = get_args(TaskName)
_HISTORY = "history"  # In `config.json`: what has been changed, and when.


def held(workdir: Path):
  """One process of a run locks its work directory for all of them."""
  in_bucket = not is_local(workdir)  # There it may take a minute.
  if distributed.is_main():
    return lock.owned(workdir, distributed.agree if in_bucket else bool)
  while in_bucket and not distributed.agree(False):
    pass
  return contextlib.nullcontext()


def claim(
  config: RunConfig,
  workdir: Path,
  *,
  saved: Mapping[str, int],
  accept_changed_data: bool = False,
  change_settings: bool = False,
  has_flags: bool = True,
) -> list[str]:
  """Writes `config.json`; refuses a directory of another config.

  Settings that change no number may differ, others if that is accepted; what
  was changed, at which steps, is kept under "history". Before anything is
  saved, any config may take the directory.

  Args:
    config: of the run.
    workdir: of the run.
    saved: the newest step of each task that has one.
    accept_changed_data: let data settings and the global batch size differ.
    change_settings: let lengths, rates, losses and evaluations differ.
    has_flags: whether the command knows these two as flags.

  Returns:
    The keys that differ.

  Raises:
    ConfigError: keys differ that may not, or a run was made shorter than it
      is.
  """
  path = workdir / "config.json"
  mine = config_parsing.to_dict(config)
  for task, step in saved.items():
    if task in config.tasks and config.stage(task).train.steps < step:
      raise ConfigError(
        f"config key '{task}.train.steps' is "
        f"{config.stage(task).train.steps}, but {workdir} has saved step "
        f"{step}; use that or more."
      )
  theirs = _read(path) if path.exists() and saved else mine
  history = theirs.pop(_HISTORY, [])
  idle = {stage for stage in _STAGES if stage not in config.tasks}
  changed = sorted(
    key for key in _differences(theirs, mine) if key.split(".")[0] not in idle
  )
  accepted = {
    "--accept_changed_data": accept_changed_data,
    "--change_settings": change_settings,
  }
  asked = {key: _flag_of(key) for key in changed}
  refused = [
    key for key, flag in asked.items() if not accepted.get(flag, not flag)
  ]
  if refused:
    flags = sorted({asked[key] for key in refused}) if has_flags else []
    raise ConfigError(_refusal(workdir, refused, flags))
  if changed:
    values = {k: [_at(theirs, k), _at(mine, k)] for k in changed}
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    history.append({"at": now, "steps": dict(saved), "changed": values})
  distributed.wait_for_all("claim")  # All have looked before one writes.
  if distributed.is_main() and (changed or not path.exists() or not saved):
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(mine | {_HISTORY: history}, indent=1)
    paths.write_whole(path, text)
  return changed


def forget_results(workdir: Path, changed: list[str]) -> None:
  """Removes the results that changed settings make stale: a task with another
  number of steps is not done, nor is the evaluation behind it.

  Args:
    workdir: of the run.
    changed: what `claim` returned.
  """
  longer = [k for k in changed if k.endswith(".train.steps")]
  stale = [workdir / key.split(".")[0] for key in longer]
  if longer or any(key.startswith("eval.") for key in changed):
    stale.append(workdir)
  for folder in stale if distributed.is_main() else ():
    (folder / "results.json").unlink(missing_ok=True)
  distributed.wait_for_all("forget results")


def _flag_of(key: str) -> str:
  """What lets a key change: a flag, "" for nothing, "never"."""
  if _is_any(key, _FREE):
    return ""
  if not _is_any(key, _FIXED):
    for flag, patterns in _ACCEPTED.items():
      if _is_any(key, patterns):
        return flag
  return "never"


def _is_any(key: str, patterns: tuple[str, ...]) -> bool:
  stage, _, rest = key.partition(".")
  if stage in _STAGES:
    key = f"*.{rest}"
  return any(
    key == p or (p.endswith(".*") and key.startswith(p[:-1])) for p in patterns
  )


def _refusal(workdir: Path, refused: list[str], flags: list[str]) -> str:
  keys = ", ".join(refused[:5])
  remedy = f"give another directory, or the same {keys}"
  if flags and "never" not in flags:
    remedy += f", or accept the change with {' '.join(flags)}"
  return (
    f"work directory {workdir} was created with a different config (it differs "
    f"in {keys}); {remedy}."
  )


def _at(values: Any, key: str) -> Any:
  for part in key.split("."):
    values = values.get(part) if isinstance(values, dict) else None
  return values


def _read(path: Path) -> dict[str, Any]:
  """A damaged file says nothing of the config; that of the checkpoints would,
  but nobody damages it alone by chance: better ask."""
  try:
    found = json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise ConfigError(
      f"{path} is damaged ({error}); delete it if the directory is of this "
      "config."
    ) from error
  if not isinstance(found, dict):
    raise ConfigError(
      f"{path} is damaged (not a JSON object); delete it if the directory is "
      "of this config."
    )
  return found


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
  if isinstance(a, dict) and isinstance(b, dict):
    found = []
    for key in a.keys() | b.keys():
      name = f"{where}.{key}" if where else key
      found += _differences(a.get(key), b.get(key), name)
    return found
  return [] if a == b else [where]
