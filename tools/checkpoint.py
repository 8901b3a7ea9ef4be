"""`argenseg checkpoint`: what a directory of checkpoints holds, and whether it
is still what was saved."""

import argparse
import itertools
import json
import math
import time
from typing import Any

import numpy as np

from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path

_LINE = "{:>8}  {:>9}  {:16}  {:7}  {:>8}  {}"
_EPILOG = """examples:
  argenseg checkpoint ls runs/quickstart/mllm
  argenseg checkpoint verify runs/quickstart
  argenseg checkpoint inspect runs/quickstart/mllm
  argenseg checkpoint diff runs/a/mllm/checkpoints/500 runs/b/mllm"""


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg checkpoint",
    description="ls: steps, sizes, the last loss before each, what evaluations "
    "measured, and whether every file is there with its size. verify: compare "
    "every byte with the manifest and what is stored with the model (exit code "
    "1 if a step is damaged). inspect: "
    "names, shapes, dtypes and shardings. diff: what differs between two "
    "checkpoints (exit code 1 if anything does).",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name in ("ls", "verify", "inspect"):
    commands.add_parser(name).add_argument("path")
  two = commands.add_parser("diff")
  two.add_argument("path")
  two.add_argument("other")
  args = parser.parse_args(argv)
  from argenseg_jax import checkpoint

  path = paths.as_path(args.path)
  if args.command == "ls":
    return _list(checkpoint.steps_below(path))
  if args.command == "verify":
    return _verify(checkpoint.steps_below(path))
  if args.command == "inspect":
    return _inspect(path)
  return _diff(path, paths.as_path(args.other))


def _list(steps: list[Path]) -> int:
  from argenseg_jax.checkpoint import manifest, step_number, workdir_of

  for directory, found in itertools.groupby(steps, lambda step: step.parent):
    group = list(found)
    print(f"{directory}:")
    print(_LINE.format("step", "MiB", "saved", "files", "loss", "scores"))
    log = _log(workdir_of(group[0]))
    losses = {number: v["loss"] for number, v in log.items() if "loss" in v}
    for step in group:
      number = step_number(step)
      entries = paths.tree(step).values()
      saved = time.localtime(max((e.modified for e in entries), default=0))
      before = max((s for s in losses if s <= number), default=None)
      cells = (
        step.name,
        f"{sum(e.size for e in entries) / 2**20:.1f}",
        time.strftime("%Y-%m-%d %H:%M", saved),
        "damaged" if manifest.faults(step, contents=False) else "whole",
        "" if before is None else f"{losses[before]:.4f}",
        ", ".join(_scores(step, log.get(number, {}))),
      )
      print(_LINE.format(*cells).rstrip())
  return 0


def _log(workdir: Path) -> dict[int, dict[str, float]]:
  """The numbers of `metrics.jsonl` by step; what was written last counts."""
  path, found = workdir / "metrics.jsonl", {}
  text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
  for line in text.splitlines():
    try:
      values = _numbers(json.loads(line))
      found.setdefault(int(values["step"]), {}).update(values)
    except (ValueError, KeyError, OverflowError, RecursionError):
      continue  # Cut off by a kill, or not ours.
  return found


def _numbers(values: Any) -> dict[str, float]:
  """Those that a JSON object holds."""
  pairs = values.items() if isinstance(values, dict) else ()
  return {
    k: v
    for k, v in pairs
    if isinstance(v, (int, float)) and not isinstance(v, bool)
  }


def _scores(step: Path, logged: dict[str, float]) -> list[str]:
  """What was measured at a step: by evaluations in training, by the one after
  the last step, and the score that `train.keep_best` goes by."""
  from argenseg_jax.checkpoint import step_number, workdir_of
  from argenseg_jax.evaluation.evaluator import headline

  measured: dict[str, dict[str, float]] = {}
  for name, value in logged.items():
    split, _, metric = name.rpartition("/")
    measured.setdefault(split, {})[metric] = value
  measured.pop("", None)
  workdir = workdir_of(step)
  if _read(workdir / "results.json").get("steps") == step_number(step):
    results = _read(workdir.parent / "results.json")
    splits = results.get("splits", results)
    for split, values in splits.items() if isinstance(splits, dict) else ():
      measured[split] = _numbers(values)
  said = [f"{k}: {v}" for k, x in measured.items() if (v := headline(x))]
  kept_by = _numbers(_read(step / "metrics" / "metrics")).get("score")
  return said if kept_by is None else [*said, f"score {kept_by:.4f}"]


def _read(path: Path) -> dict[str, Any]:
  """A JSON object of a file; none where there is no such file."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def _verify(steps: list[Path]) -> int:
  from argenseg_jax import checkpoint
  from argenseg_jax.checkpoint import manifest

  damaged = 0
  for step in steps:
    faults = manifest.faults(step) or (
      *manifest.faults_beside(step, checkpoint.beside(step)),
      *checkpoint.structure_faults(step),
    )
    damaged += bool(faults)
    print(f"{step}: {'damaged' if faults else 'good'}")
    for fault in faults:
      print(f"  {fault}")
  return int(damaged > 0)


def _inspect(path: Path) -> int:
  from argenseg_jax import checkpoint

  found = checkpoint.describe(path)
  print(f"{found.path}: {found.task}, format {found.meta['format']}")
  total = 0
  for name, leaf in checkpoint.stored_variables(found.path).items():
    total += math.prod(leaf.shape)
    print(
      f"  {name}  {leaf.dtype}{list(leaf.shape)}  {_axes_of(leaf.sharding)}"
    )
  print(f"{total:,} values")
  return 0


def _axes_of(sharding) -> str:
  """Mesh axes that an array was split over when it was saved."""
  import jax

  names = getattr(sharding, "axis_names", ())
  sizes = dict(zip(names, getattr(sharding, "shape", ()), strict=True))
  axes = jax.tree.leaves(tuple(getattr(sharding, "partition_spec", ())))
  split = [f"{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1]
  return f"split over {', '.join(split)}" if split else "whole"


def _diff(path: Path, other: Path) -> int:
  from argenseg_jax import checkpoint

  a, b = (checkpoint.read_variables(p) for p in (path, other))
  differs = 0
  for name in sorted(a.keys() | b.keys()):
    if name not in a or name not in b:
      said = f"only in {path if name in a else other}"
    elif a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
      said = " against ".join(f"{v[name].dtype}{v[name].shape}" for v in (a, b))
    elif np.array_equal(a[name], b[name], equal_nan=True):
      continue
    else:
      gap = np.abs(a[name].astype(np.float64) - b[name].astype(np.float64))
      said = f"differs by up to {np.max(gap):.3g}"
    differs += 1
    print(f"{name}: {said}")
  print(f"{differs} of {len(a.keys() | b.keys())} variables differ")
  return int(differs > 0)
