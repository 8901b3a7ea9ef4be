"""Kills a run with SIGKILL at random moments until it ends; nothing is lost.

`killing_test.py` does it a few times. By hand, as often as wanted:

  python tests/faults/killing.py --kills=50 --folder=/tmp/kills

A process that has imported everything forks one child for each start of the
run: importing JAX takes longer than the run itself.
"""

import argparse
import faulthandler
import json
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable

if __name__ == "__main__":  # Pytest puts it on the path by itself.
  sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from tiny_run import COMMAND, options

from argenseg_jax import checkpoint
from argenseg_jax.checkpoint import manifest
from argenseg_jax.data.ref_shapes import builder
from argenseg_jax.tools import cli
from argenseg_jax.training import loop as train

SAVE_EVERY = 2
# The steps since the last save, and those while it was being written.
MOST_REDONE = 2 * SAVE_EVERY
_LOG = os.environ.get("KILLING_LOG", os.devnull)  # What the runs print.


def command(folder: pathlib.Path, workdir: pathlib.Path, steps: int) -> list:
  """Arguments of `argenseg` for a run of `steps` steps."""
  return [
    *COMMAND[3:],
    *options(folder / "data", workdir),
    f"--config.mllm.train.steps={steps}",
    f"--config.mllm.train.save_every={SAVE_EVERY}",
    "--config.mllm.train.keep=2",
    "--config.loss.drop_scale_inputs=0.4",  # Random numbers in each step.
  ]


def prepare(folder: pathlib.Path) -> None:
  """Writes the data, in a child: array_record's threads survive no fork."""
  child = os.fork()
  if not child:
    try:
      builder.prepare(folder / "made", num_train=24, num_eval=8, seed=0)
      os._exit(0)
    finally:
      os._exit(1)
  _, status = os.waitpid(child, 0)
  assert status == 0, status
  (notes,) = (folder / "made").rglob("dataset_info.json")
  os.symlink(notes.parent, folder / "data")


def start(arguments: list, *, kill_in_save: bool = False) -> int:
  """Forks a run; returns its process."""
  child = os.fork()
  if child:
    return child
  code = 1
  try:
    log = os.open(_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    if kill_in_save:
      _kill_in_save()
    code = cli.main(arguments)
  finally:
    os._exit(code)


def _kill_in_save() -> None:
  """SIGKILL while a step is written, before or after its manifest."""
  sign = checkpoint.Checkpoints._sign

  def signs(self):
    if self._saving > SAVE_EVERY and random.random() < 0.7:
      if random.random() < 0.5:
        sign(self)
      os.kill(os.getpid(), signal.SIGKILL)
    sign(self)

  checkpoint.Checkpoints._sign = signs


def newest(workdir: pathlib.Path) -> int:
  """The newest step, 0 if there is none; AssertionError if it is damaged.

  An older one may be: a kill can come while it is deleted.
  """
  folder = workdir / "mllm" / "checkpoints"
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  step = max([int(name) for name in names if name.isdigit()], default=0)
  assert not step or not manifest.faults(folder / str(step)), folder / str(step)
  return step


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """By step, the last one said; lines cut off by a kill are left out."""
  found = {}
  for line in (workdir / "mllm" / "metrics.jsonl").read_text().splitlines():
    try:
      values = json.loads(line)
    except ValueError:
      continue
    if "loss" in values:
      found[values["step"]] = values["loss"]
  return found


def loop(
  folder: pathlib.Path,
  *,
  kills: int,
  steps: int,
  say: Callable[[str], None] = print,
) -> dict[str, int]:
  """Runs once whole and once with `kills` kills; compares.

  Args:
    folder: an empty one.
    kills: every second one inside a save.
    steps: of the run; a run that ends before all kills starts again.
    say: gets a line a kill.

  Returns:
    Counts of what happened.
  """
  prepare(folder)
  whole = folder / "whole"
  began = time.monotonic()
  _, status = os.waitpid(start(command(folder, whole, steps)), 0)
  assert status == 0, status
  seconds = time.monotonic() - began
  expected = losses(whole)
  counts = {"kills": 0, "in a save": 0, "runs": 1, "steps redone, most": 0}
  workdir, own = folder / "killed1", 0  # Kills of this run.
  while counts["kills"] < kills:
    in_save = counts["kills"] % 2 == 1
    before, began = newest(workdir), time.monotonic()
    child = start(command(folder, workdir, steps), kill_in_save=in_save)
    if not in_save:
      time.sleep(random.uniform(0.1, 1.2) * seconds)
      os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    after = newest(workdir)
    assert after >= before, f"step {before} was lost, {after} is left"
    if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
      counts["kills"] += 1
      own += 1
      counts["in a save"] += in_save
      log = workdir / "mllm" / "metrics.jsonl"
      reached = max(losses(workdir), default=0) if log.exists() else 0
      redone = max(reached - after, 0)
      counts["steps redone, most"] = max(counts["steps redone, most"], redone)
      assert redone <= MOST_REDONE, f"at {reached} or after, {after} is kept"
      say(
        f"kill {counts['kills']}: at step {reached} or after, {after} is kept"
      )
    else:
      assert status == 0, f"the run failed: {status}"
      # The first one compiled; kills that come too late are none.
      seconds = min(seconds, time.monotonic() - began)
    if (workdir / "mllm" / "results.json").exists():
      _same(workdir, expected, own)
      counts["runs"] += 1
      workdir, own = folder / f"killed{counts['runs']}", 0
  _, status = os.waitpid(start(command(folder, workdir, steps)), 0)
  assert status == 0, status
  _same(workdir, expected, own)
  return counts


def _same(
  workdir: pathlib.Path, expected: dict[int, float], kills: int
) -> None:
  """Compares a run that was killed `kills` times with one that was not."""
  found = losses(workdir)
  missing = set(expected) - set(found)
  # A line that a kill cut off is not written again where its step was saved.
  assert len(missing) <= kills, missing
  assert max(found) == max(expected), "the last step is missing"
  assert all(found[step] == expected[step] for step in found), (found, expected)


def _main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--folder", required=True)
  args = parser.parse_args()
  folder = pathlib.Path(args.folder)
  folder.mkdir(parents=True)
  began = time.monotonic()
  print(loop(folder, kills=args.kills, steps=args.steps))
  print(f"{time.monotonic() - began:.0f} s")
  return 0


if __name__ == "__main__":
  assert train  # Imported before the first fork.
  sys.exit(_main())
