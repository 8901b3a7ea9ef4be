"""`argenseg bench NAME`: measurements, one module each."""

import importlib
import sys

# Name -> what `argenseg bench --help` says of it; see tools/bench_NAME.py.
BENCHES = {
  "data": "samples a second of a core, and how long training waits for them",
  "exits": "quality and speed of masks that stop after fewer scales",
  "generate": "what a mask costs, stage by stage, also beside PyTorch",
  "kernels": "memory, work against each chip's roofline, and time of kernels",
  "train": "a training step, forward and backward, also beside PyTorch",
}


def main(argv: list[str]) -> int:
  """Runs a measurement; returns the exit code (2 for bad input)."""
  if not argv or argv[0] in ("-h", "--help"):
    print(_help())
    return 0
  name, rest = argv[0], argv[1:]
  if name not in BENCHES:
    print(
      f"argenseg bench: unknown measurement {name!r}; use one of "
      f"{', '.join(BENCHES)}.",
      file=sys.stderr,
    )
    return 2
  module = importlib.import_module(f"argenseg_jax.tools.bench_{name}")
  return module.main(rest)


def _help() -> str:
  width = max(map(len, BENCHES))
  lines = ["argenseg bench: measure this machine, or compile for another.", ""]
  lines += [f"  {name:{width}}  {text}" for name, text in BENCHES.items()]
  lines += ["", "example: argenseg bench kernels --chips=v5e"]
  return "\n".join(lines)
