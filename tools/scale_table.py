"""Makes the table of docs/scale.md with `argenseg plan`, row by row.

  python -m argenseg_jax.tools.scale_table [--rows=v5p-64,v5e-256] [--docs=docs]

Reports go to docs/scale.json, the table into docs/scale.md between its marks.
Rows that are not asked for keep their reports, so TPU and GPU rows can come
from two environments. A row of the 8B model takes some minutes.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SAMPLES = 12_900 * 128  # Of the paper's one epoch.
MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")


class Row(NamedTuple):
  """One line: a config on a topology at a batch of 2,048-token sequences."""

  topology: str
  chips: int
  rows_a_chip: int
  config: str = "argenseg_8b_stage1"
  slices: int = 1
  changes: tuple[str, ...] = ()

  @property
  def arguments(self) -> list[str]:
    batch = self.chips * self.rows_a_chip
    return [
      f"--topology={self.topology}",
      f"--slices={self.slices}",
      f"--config.mllm.train.global_batch_size={batch}",
      f"--config.mllm.train.steps={SAMPLES // batch}",
      *self.changes,
    ]


ROWS = {
  "8B, v5p-64": Row("v5p:4x4x4", 64, 8),
  "8B, v5e-256": Row("v5e:16x16", 256, 4),
  "8B, v6e-256": Row("v6e:16x16", 256, 8),
  "8B, 2 x v5e-256": Row("v5e:16x16", 512, 4, slices=2),
  "8B, 8 x H100": Row("h100:8", 8, 4),
  "1B, v5e-8": Row("v5e:2x4", 8, 4, config="argenseg_1b"),
  "8B, v5e-64": Row("v5e:8x8", 64, 4),
  "8B, v5e-128": Row("v5e:8x16", 128, 4),
}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m argenseg_jax.tools.scale_table",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--rows", default="", help="parts of names; default: all")
  parser.add_argument("--docs", type=pathlib.Path, default=pathlib.Path("docs"))
  options = parser.parse_args(argv)
  path = options.docs / "scale.json"
  reports = json.loads(path.read_text()) if path.exists() else {}
  for name, row in ROWS.items():
    if not any(part in name for part in options.rows.split(",")):
      continue
    report = plan(row)
    reports[name] = report
    ordered = {n: reports[n] for n in ROWS if n in reports}
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    write_table(options.docs / "scale.md", ordered)
    print(f"{name}: {report['plan_seconds']} s", flush=True)
  return 0


def plan(row: Row) -> dict[str, Any]:
  """The report of a row, in a process of its own; raises if there is none."""
  began = time.monotonic()
  done = subprocess.run(
    [
      *(sys.executable, "-m", "argenseg_jax.tools.cli", "plan", "--json"),
      f"--config={CONFIGS / (row.config + '.py')}",
      *row.arguments,
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  if done.returncode not in (0, 1):
    raise SystemExit(done.returncode)
  (report,) = json.loads(done.stdout)
  seconds = round(time.monotonic() - began)
  return {"arguments": row.arguments, "plan_seconds": seconds, **report}


def write_table(path: pathlib.Path, reports: dict[str, dict]) -> None:
  """Puts a Markdown table between the marks of a page."""
  before, rest = path.read_text().split(MARKS[0])
  _, after = rest.split(MARKS[1])
  head = (
    "Run",
    "Batch a chip",
    "Peak, share of HBM",
    "Gathered",
    "Reduce-scattered",
    "All-reduced (largest)",
    "DCN",
    "s a step, at least",
    "MFU, at most",
    "Tokens/s",
    "Hours",
  )
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for name, report in reports.items():
    lines.append("| " + " | ".join((name, *_cells(name, report))) + " |")
  table = "\n".join(lines) + "\n"
  path.write_text(before + MARKS[0] + table + MARKS[1] + after)


def _cells(name: str, report: dict[str, Any]) -> list[str]:
  batch = f"{ROWS[name].rows_a_chip} x 2,048"
  if "peak" not in report:
    return [batch, f"does not fit: {report['excess']}"] + [""] * 8
  peak, hbm = report["peak"], report["hbm"]
  found = report["collectives"]

  def moved(kind):
    return f"{found[kind]['bytes'] / 2**30:.1f} GiB" if kind in found else "-"

  reduced = found.get("all-reduce", {"bytes": 0, "largest": 0})
  remote = sum(e["bytes"] for k, e in found.items() if k.endswith("(DCN)"))
  return [
    batch,
    f"{peak / 2**30:.1f} GiB, {peak / hbm:.0%}",
    moved("all-gather"),
    moved("reduce-scatter"),
    f"{reduced['bytes'] / 2**20:.1f} MiB ({reduced['largest'] / 2**20:.1f})",
    f"{remote / 2**30:.2f} GiB" if remote else "-",
    f"{report['step_seconds']:.2f}",
    f"{report['mfu']:.0%}",
    f"{report['tokens_per_second']:,.0f}",
    f"{report['hours']:.1f}",
  ]


if __name__ == "__main__":
  sys.exit(main())
