"""`argenseg checkpoint`: what a directory of checkpoints holds, and whether it
is still what was saved."""

import argparse
import json
import math
import pathlib
import time

import numpy as np

_EPILOG = """examples:
  argenseg checkpoint ls runs/quickstart/mllm
  argenseg checkpoint verify runs/quickstart
  argenseg checkpoint inspect runs/quickstart/mllm
  argenseg checkpoint diff runs/a/mllm/checkpoints/500 runs/b/mllm"""


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg checkpoint",
    description="ls: steps, sizes, losses. verify: compare every file with its "
    "manifest (exit code 1 if one is damaged). inspect: names, shapes, dtypes "
    "and shardings. diff: what differs between two checkpoints (exit code 1 if "
    "anything does).",
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
  path = pathlib.Path(args.path)
  if args.command == "ls":
    return _list(_steps(path))
  if args.command == "verify":
    return _verify(_steps(path))
  if args.command == "inspect":
    return _inspect(path)
  return _diff(path, pathlib.Path(args.other))


def _steps(path: pathlib.Path) -> list[pathlib.Path]:
  """All steps under a directory, also those of several tasks."""
  from argenseg_jax.checkpoint import CheckpointError

  if not path.exists():
    raise CheckpointError(f"checkpoint {path} does not exist.")
  if path.name.isdigit():
    return [path]
  found = [d for d in path.rglob("checkpoints/*") if d.name.isdigit()]
  found += [d for d in path.glob("*") if d.name.isdigit()]
  if not found:
    raise CheckpointError(f"{path} holds no checkpoint.")
  return sorted(found, key=lambda d: (d.parent, int(d.name)))


def _list(steps: list[pathlib.Path]) -> int:
  print(f"{'step':>8}  {'MiB':>9}  {'saved':16}  {'loss':>8}  directory")
  for step in steps:
    files = [f.stat() for f in step.rglob("*") if f.is_file()]
    size = sum(f.st_size for f in files) / 2**20
    saved = time.localtime(max(f.st_mtime for f in files))
    loss = _loss_at(step)
    print(
      f"{step.name:>8}  {size:9.1f}  {time.strftime('%Y-%m-%d %H:%M', saved)}  "
      f"{'' if loss is None else f'{loss:.4f}':>8}  {step.parent}"
    )
  return 0


def _loss_at(step: pathlib.Path) -> float | None:
  """The last loss that was logged up to a step."""
  log = step.parent.parent / "metrics.jsonl"
  loss = None
  for line in log.read_text().splitlines() if log.is_file() else ():
    try:
      values = json.loads(line)
    except ValueError:  # Cut off by a kill.
      continue
    if values["step"] > int(step.name):
      break
    loss = values.get("loss", loss)
  return loss


def _verify(steps: list[pathlib.Path]) -> int:
  from argenseg_jax import integrity

  damaged = 0
  for step in steps:
    faults = integrity.faults(step)
    damaged += bool(faults)
    print(f"{step}: {'damaged' if faults else 'good'}")
    for fault in faults:
      print(f"  {fault}")
  return int(damaged > 0)


def _inspect(path: pathlib.Path) -> int:
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
  names = getattr(sharding, "axis_names", ())
  sizes = dict(zip(names, getattr(sharding, "shape", ()), strict=True))
  axes = np.ravel([a for a in getattr(sharding, "partition_spec", ()) if a])
  split = [f"{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1]
  return f"split over {', '.join(split)}" if split else "whole"


def _diff(path: pathlib.Path, other: pathlib.Path) -> int:
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
