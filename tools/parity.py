"""`argenseg parity`: does this code compute what the authors' code computed?"""

import argparse
import json

EXAMPLE = """\
example:
  argenseg parity tests/golden/internvit_rmsnorm --json report.json

A golden folder holds config.json, io.npz (in.* and out.* arrays) and, but for
preprocessing, weights.safetensors. Exit code 0: everything agrees.
"""


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg parity",
    description="Computes every recorded array of a golden folder anew.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", metavar="DIR")
  parser.add_argument(
    "--json",
    nargs="?",
    const="-",
    metavar="FILE",
    help="write the report as JSON to FILE, or instead of the table",
  )
  args = parser.parse_args(argv)
  import jax

  # Arithmetic is in question, not speed: compile quickly, multiply exactly.
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_default_matmul_precision", "highest")
  from argenseg_jax.runtime import paths
  from argenseg_jax.torch_weights.parity import run

  verdicts, skipped = run.parity(args.folder)
  report = json.dumps(run.as_json(verdicts, skipped), indent=1)
  if args.json == "-":
    print(report)
  else:
    print(_table(verdicts, skipped))
  if args.json not in (None, "-"):
    paths.disk_path(args.json).write_text(report + "\n")
  right = all(verdict.ok for verdict in verdicts.values())
  return 0 if right and not skipped else 1


def _table(verdicts, skipped) -> str:
  width = max(map(len, (*verdicts, *skipped)), default=0)
  lines = [f"{'array':{width}}  max_abs   max_rel"]
  for name, v in verdicts.items():
    text = v.error or f"{v.max_abs:.2e}  {v.max_rel:.2e}"
    lines.append(f"{name:{width}}  {text}  {'ok' if v.ok else 'DIFFERS'}")
  lines += [f"{n:{width}}  not compared: {why}" for n, why in skipped.items()]
  wrong = sum(not v.ok for v in verdicts.values())
  lines.append(
    f"{len(verdicts)} compared, {wrong} differ, {len(skipped)} not compared."
  )
  return "\n".join(lines)
