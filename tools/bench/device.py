"""`argenseg bench device`: what this accelerator gives, part by part."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

from argenseg_jax.tools.bench.timing import add_profile_option

EXAMPLE = """\
examples:
  argenseg bench device --budget=720 --out=h100.jsonl
  argenseg bench device --out=h100.jsonl --markdown        print the table only
  argenseg bench device --only=ceilings,loss --budget=120

Each part runs in a process of its own, under its own time limit, the most
important first. Every result is one JSON line, written as soon as it is there.
Rerun the same command to resume: finished parts are not run again. Weights and
images are random; "bound" is the time that the counted FLOPs or bytes take at
the device's published rates. On a CPU the parts run at tiny sizes.
"""


class Part(NamedTuple):
  """A group of measurements.

  Attributes:
    about: what `--help` says of it.
    seconds: after which its process is stopped.
    environment: variables of its process.
  """

  about: str
  seconds: float
  environment: dict[str, str] = {}


_COMMAND = ["-m", "argenseg_jax.tools.bench.device_parts"]
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1"}
# JAX would keep three quarters of a GPU's memory from PyTorch.
_FREE_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# Most important first.
PARTS = {
  "ceilings": Part("a large product and a large copy", 40),
  "correct": Part("kernels and attention against their references", 60),
  "mask": Part("one mask of the 8B model, bfloat16, batch 1", 240),
  "loss": Part("loss and gradients, each implementation", 80),
  "train_1b": Part("a training step of the 1B model, batch 16", 150),
  "mask_int8": Part("one mask, int8 weights", 240),
  "attention": Part("value and gradient, library and plain", 80),
  "prediction": Part("scale prediction many times in one program", 60),
  "mask_16": Part("16 masks at a time", 240),
  "peer": Part("the PyTorch loop", 150, _FREE_MEMORY),
  "train_2b": Part("a training step of the 2B model, batch 8", 150),
  "mask_fp8": Part("one mask, float8 weights", 240),
}
_LEAST = 15.0  # Seconds below which no further part begins.


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg bench device",
    description="Measures everything that matters on this accelerator:\n\n"
    + "\n".join(f"  {name:11} {part.about}" for name, part in PARTS.items()),
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--budget", type=float, default=720, help="seconds to spend in all"
  )
  parser.add_argument(
    "--out", default="device.jsonl", help="JSON lines to add to"
  )
  parser.add_argument("--only", default="", help="some parts, comma-separated")
  parser.add_argument(
    "--size",
    default="auto",
    choices=("auto", "full", "tiny"),
    help="auto: full on accelerators, tiny on CPUs",
  )
  parser.add_argument(
    "--markdown", action="store_true", help="print the table of --out and stop"
  )
  add_profile_option(parser)
  args = parser.parse_args(argv)
  out = pathlib.Path(args.out)
  names = args.only.split(",") if args.only else list(PARTS)
  if unknown := sorted(set(names) - set(PARTS)):
    parser.error(f"unknown part {unknown[0]!r}; use {', '.join(PARTS)}")
  if args.budget <= 0:
    parser.error("--budget must be positive")
  if args.markdown:
    print(markdown(read(out)))
    return 0
  failed = run_parts(
    names, out, budget=args.budget, size=args.size, profile=args.profile
  )
  return 1 if failed else 0


def run_parts(
  names: list[str],
  out: pathlib.Path,
  *,
  budget: float,
  size: str,
  profile: str | None = None,
) -> list[str]:
  """Runs what `out` does not contain yet; returns the parts that failed."""
  end = time.monotonic() + budget
  done = {line["part"] for line in read(out) if line.get("finished")}
  failed = []
  for name in names:
    left = end - time.monotonic()
    if name in done:
      continue
    if left < _LEAST:
      print(f"{name}: not started, the budget is spent; rerun to resume")
      continue
    seconds = min(PARTS[name].seconds, left)
    options = [size] if profile is None else [size, profile]
    if not _run_part(name, out, seconds, options):
      failed.append(name)
  return failed


def _run_part(
  name: str, out: pathlib.Path, seconds: float, options: list[str]
) -> bool:
  """Whether the part finished; its lines are in `out` either way."""
  began = time.monotonic()
  command = [sys.executable, *_COMMAND]
  log_path = out.with_suffix(f".{name}.log")
  with (
    open(log_path, "w", encoding="utf-8") as log,
    subprocess.Popen(
      [*command, name, *options],
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
      env={**os.environ, **_ENVIRONMENT, **PARTS[name].environment},
    ) as child,
  ):
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
      for line in child.stdout or ():
        if line.startswith("{"):
          _append(out, {"part": name, **json.loads(line)})
      code = child.wait()
    finally:
      timer.cancel()
      child.kill()
  took = round(time.monotonic() - began, 1)
  if code == 0:
    _append(out, {"part": name, "finished": True, "seconds": took})
    log_path.unlink()
    return True
  if took >= seconds - 0.5:
    reason = f"stopped after {seconds:.0f} s"
  else:
    lines = log_path.read_text(encoding="utf-8").strip().splitlines()
    reason = lines[-1][:300] if lines else f"exit code {code}"
  _append(out, {"part": name, "error": reason, "seconds": took})
  return False


def _append(out: pathlib.Path, line: dict[str, Any]) -> None:
  text = json.dumps(line)
  with open(out, "a", encoding="utf-8") as file:
    file.write(text + "\n")
    file.flush()
    os.fsync(file.fileno())
  print(text, flush=True)


def read(out: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of an earlier run; a line that a kill cut off is left out."""
  if not out.exists():
    return []
  found = []
  for line in out.read_text(encoding="utf-8").splitlines():
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return found


def markdown(lines: list[dict[str, Any]]) -> str:
  """A table of the results, the latest of each name."""
  results = {(x["part"], x["name"]): x for x in lines if "name" in x}
  devices = sorted({x["device"] for x in results.values() if "device" in x})
  rows = [", ".join(devices), "", "| part | what | value | bound | of bound |"]
  rows.append("|---|---|---:|---:|---:|")
  for (part, name), x in results.items():
    value = f"{x['value']:.4g} {x['unit']}"
    bound = share = ""
    if x.get("bound"):
      bound, share = f"{x['bound']:.4g}", f"{x['bound'] / x['value']:.0%}"
    rows.append(f"| {part} | {name} | {value} | {bound} | {share} |")
  for x in lines:
    if "error" in x:
      rows.append(f"| {x['part']} | {x['error']} | | | |")
  return "\n".join(rows)
