"""`argenseg plan`: what a run needs and costs on hardware you don't have."""

import json
from typing import Any

from absl import flags

from argenseg_jax.config import ConfigError
from argenseg_jax.tools import plan_search
from argenseg_jax.tools.common import gib
from argenseg_jax.tools.train import config_values, parse

HELP = f"""\
argenseg plan --config=FILE --topology=CHIP:SIZE [--config.KEY=VALUE ...]
  [FLAGS]

Compiles the real program ahead of time with the real compiler and says whether
it fits, what fills the memory, which collectives run, and a lower bound on the
time of a step.

  --config=FILE           config to plan for (required)
  --config.KEY=VALUE      override one key; configs/base.py explains every key
  --topology=CHIP:SIZE    hardware to compile for (required). CHIP is cpu, a TPU
                          (v5e, v5p, v6e, tpu7x; needs libtpu) or a GPU (h100,
                          h200; needs JAX's CUDA plugin); SIZE is the torus,
                          such as 4x4x4, or the number of devices
  --slices=N              number of such slices, joined by the data-center
                          network (default: 1)
  --what=WHAT             train (default): every task of the config; generate:
                          answering requests
  --json                  print the reports as JSON

  --search                try many settings instead, as below

Exit code 1: it does not fit.

{plan_search.HELP}

Example, the paper's training on 64 chips of TPU v5p:
  argenseg plan --config=configs/argenseg_8b_stage1.py --topology=v5p:4x4x4
"""


def main(argv: list[str]) -> int:
  if not argv or "--help" in argv or "-h" in argv:
    print(HELP)
    return 0
  values = config_values(argv)
  flags.DEFINE_string("topology", None, "", flag_values=values)
  flags.DEFINE_integer("slices", 1, "", flag_values=values)
  flags.DEFINE_enum(
    "what", "train", ["train", "generate"], "", flag_values=values
  )
  flags.DEFINE_bool("json", False, "", flag_values=values)
  flags.DEFINE_bool("search", False, "", flag_values=values)
  plan_search.define_flags(values)
  config = parse(values, argv, needs_data=False)
  if not values.topology:
    raise ConfigError("give a topology: --topology=v5p:4x4x4.")
  if values.search:
    return plan_search.main(values, config, argv)
  plan_search.refuse_flags(values)
  from argenseg_jax.planning import topology as topology_lib

  topology = topology_lib.parse(values.topology, values.slices)
  topology_lib.prepare(topology)
  from argenseg_jax import sharding
  from argenseg_jax.planning import plan, programs

  mesh = sharding.make_mesh(
    config.mesh, topology_lib.devices(topology), slices=topology.slices
  )
  tasks = config.tasks if values.what == "train" else ("generate",)
  reports = []
  for task in tasks:
    if task == "generate":
      program = programs.compile_generation(config, mesh)
    else:
      program = programs.compile_training(config, task, mesh)
    reports.append(plan.report(program, config, task, topology, mesh))
    if not values.json:
      print(describe(reports[-1]))
  if values.json:
    print(json.dumps(reports, indent=1))
  return 0 if all(report["fits"] for report in reports) else 1


def describe(report: dict[str, Any]) -> str:
  """A report for people."""
  mesh = ", ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1)
  lines = [
    f"{report['what']} of {report['variant']} on {report['topology']}"
    f" ({mesh or 'one device'})",
    _verdict(report),
    "bytes a device:",
  ]
  lines += [
    f"  {name:24} {gib(size)}" for name, size in report["bytes"].items()
  ]
  if "collectives" in report:
    lines.append("collectives of a step:")
    for kind, entry in sorted(report["collectives"].items()):
      lines.append(
        f"  {kind:20} {entry['runs']:6} runs, {gib(entry['bytes'])}, "
        f"largest {entry['largest'] / 2**20:.1f} MiB"
      )
    whole = report["whole_gradients_all_reduced"]
    lines.append(
      f"  whole gradients of split parameters all-reduced: {whole or 'none'}"
    )
  if "model_flops" in report:
    lines.append(
      f"FLOPs of a step: {report['model_flops']:.3e}, recomputed "
      f"{report['recomputed_flops']:.3e}"
    )
  if "seconds" in report:
    parts = ", ".join(f"{k} {v:.3f}" for k, v in report["seconds"].items())
    lines += [
      f"seconds at published rates: {parts}",
      f"a step takes at least {report['step_seconds']:.3f} s: MFU at most "
      f"{report['mfu']:.1%} ({report['mfu_overlapped']:.1%} if all traffic "
      "hides behind work)",
    ]
    measured = report["at_measured_shares"]
    fast, slow = measured["step_seconds"]
    low, high = measured["mfu"]
    lines.append(
      f"at the shares of its rates that H100s reached: {fast:.3f} to "
      f"{slow:.3f} s, MFU {low:.1%} to {high:.1%} (docs/scale.md)"
    )
    if "published_mfu" in report:
      low, high = report["published_mfu"]
      lines.append(
        f"MFU that others published for 7 to 8B on {report['topology']!s}'s "
        f"chip: {low:.0%}" + (f" to {high:.0%}" if high > low else "")
      )
    if "tokens_per_second" in report:
      lines.append(f"tokens per second: {report['tokens_per_second']:,.0f}")
    lines.append(
      f"whole run: {report['hours']:.1f} hours, "
      f"{report['chip_hours']:,.0f} chip-hours"
    )
  if "note" in report:
    lines.append(report["note"])
  for change in report.get("change", ()):
    lines.append(f"to make it fit: {change}")
  return "\n".join(lines)


def _verdict(report: dict[str, Any]) -> str:
  if "peak" not in report:
    return f"does not fit: {report['excess']}"
  peak = report["peak"]
  if "hbm" not in report:
    return f"needs {gib(peak)} a device"
  hbm = report["hbm"]
  if peak <= hbm:
    return (
      f"fits: {gib(peak)} of {gib(hbm)} a device ({peak / hbm:.0%}), "
      f"{gib(hbm - peak)} left"
    )
  return f"does not fit: {gib(peak)}, {gib(peak - hbm)} more than there is"
