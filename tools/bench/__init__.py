"""`argenseg bench NAME`: measurements, one module each."""

from argenseg_jax.tools import common

# Name -> what `argenseg bench --help` says of it.
BENCHES = {
  "device": "everything that matters on this accelerator, in one table",
  "data": "samples a second of a core, and how long training waits for them",
  "exits": "quality and speed of masks that stop after fewer scales",
  "generate": "what a mask costs, stage by stage, also beside PyTorch",
  "kernels": "memory, work against each chip's roofline, and time of kernels",
  "train": "a training step, forward and backward, also beside PyTorch",
}


def main(argv: list[str]) -> int:
  """Runs a measurement; returns the exit code (2 for bad input)."""
  return common.dispatch(
    "bench",
    "measure this machine, or compile for another.",
    BENCHES,
    argv,
    notes="example: argenseg bench kernels --chips=v5e\n\n"
    "All but data take --profile=DIR: traces for XProf (docs/pods.md).",
  )
