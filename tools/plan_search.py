"""`argenseg plan --search`: the best of many settings for hardware you don't
have."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.tools.common import gib

HELP = """\
Search (argenseg plan --search --config=FILE --topology=CHIP:SIZE[,...]): counts
the memory of every combination of settings, drops what cannot fit, compiles
the most promising, and prints them with their flags. Results are kept: the
same command resumes, and compiles nothing twice.

  --goal=GOAL             speed (default): most tokens a second that fit; cost:
                          cheapest tokens, of several topologies too; fit:
                          least memory
  --vary=AXIS=A,B,...     values to try; may be given for several axes:
                            remat=full,dots,none   batch=1,2,4 (rows a chip)
                            accumulate=1,2         mesh=1x-1x1 (data x fsdp x
                            param_dtype=float32,bfloat16          tensor)
                            codes=step,before (when masks are tokenized)
                            lora=0,16 (rank)       optimizer=muon,adafactor
                          All but the last line are varied unless you say so
  --memory=0.9            largest share of a device's memory to use
  --compile=8             most settings to compile, kept ones included
  --jobs=1                compilations at a time; of an 8B model each takes a
                          core, some GiB and minutes
  --price=CHIP=P,...      money for an hour of a chip, such as v5e=1.2,v5p=4.2
  --results=DIR           where results are kept (default: in the user's cache);
                          by settings and versions, so take another one after
                          you changed the code"""

_FLAGS = ("goal", "vary", "memory", "compile", "jobs", "price", "results")
_SWITCHES = ("search", "json", "nojson")  # Flags without a value.


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_enum(
    "goal", "speed", ["fit", "speed", "cost"], "", flag_values=values
  )
  flags.DEFINE_multi_string("vary", [], "", flag_values=values)
  flags.DEFINE_float("memory", 0.9, "", flag_values=values)
  flags.DEFINE_integer("compile", 8, "", flag_values=values)
  flags.DEFINE_integer("jobs", 1, "", flag_values=values)
  flags.DEFINE_string("price", "", "", flag_values=values)
  flags.DEFINE_string("results", "", "", flag_values=values)


def refuse_flags(values: flags.FlagValues) -> None:
  """Without --search, its flags would do nothing.

  Raises:
    ConfigError: one of them is given.
  """
  for name in _FLAGS:
    if values[name].present:
      raise ConfigError(f"--{name} needs --search.")


def main(values: flags.FlagValues, config: RunConfig, argv: list[str]) -> int:
  """Searches; 1 if nothing fits."""
  limits = _limits(values)
  if values.what != "train":
    raise ConfigError("--search plans training; leave --what out.")
  if len(config.tasks) != 1:
    raise ConfigError(
      "--search plans one task; give one of "
      + " or ".join(f"--config.tasks=\"('{task}',)\"" for task in config.tasks)
      + "."
    )
  import jax

  jax.config.update("jax_platforms", "cpu")  # Counting needs no device.
  from argenseg_jax.planning import search, search_space
  from argenseg_jax.planning import topology as topology_lib

  topologies = [
    topology_lib.parse(text, values.slices)
    for text in values.topology.split(",")
  ]
  for topology in topologies:
    topology_lib.require_compiler(topology)
  prices = _prices(values, [topology.name for topology in topologies])
  (task,) = config.tasks
  axes = search_space.parse_axes(values.vary, task)
  space = search_space.enumerate_settings(config, task, topologies, axes)
  if not space.given and not space.settings:
    raise ConfigError(f"no setting can be built: {next(iter(space.refused))}")
  folder = _folder(values.results)
  outcomes = search.run(
    space.given,
    space.settings,
    search.order(values.goal, prices),
    lambda setting: compile_apart(setting, argv),
    limits=limits,
    results=folder,
    tell=lambda text: print(text, file=sys.stderr, flush=True),
  )
  found = search.summary(config, space, outcomes, limits, values.goal, prices)
  print(json.dumps(found, indent=1) if values.json else describe(found))
  return 0 if found["best"] else 1


def _folder(results: str) -> pathlib.Path:
  """Where reports are kept."""
  if results:
    return pathlib.Path(results)
  from argenseg_jax.runtime import compilation_cache

  try:
    return compilation_cache.user_cache() / "plans"
  except RuntimeError as error:
    raise ConfigError(
      "this user has no home for results; give --results=DIR."
    ) from error


def _limits(values: flags.FlagValues):
  from argenseg_jax.planning import search

  if not 0 < values.memory <= 1:
    raise ConfigError(f"--memory={values.memory} must be above 0 and up to 1.")
  for name in ("compile", "jobs"):
    if getattr(values, name) < 1:
      raise ConfigError(f"--{name}={getattr(values, name)} must be 1 or more.")
  return search.Limits(values.memory, values.compile, values.jobs)


def _prices(values: flags.FlagValues, chips: list[str]) -> dict[str, float]:
  """Money for an hour of each chip."""
  prices = {}
  for text in filter(None, values.price.split(",")):
    chip, _, price = text.rpartition("=")
    try:
      number = float(price)
    except ValueError:
      number = 0.0
    if not 0 < number < float("inf") or (chip and chip not in chips):
      raise ConfigError(
        f"--price={values.price}: {text!r} is no price of a chip of "
        f"--topology; write {chips[0]}=4.20."
      )
    prices |= {chip: number} if chip else dict.fromkeys(chips, number)
  missing = [chip for chip in chips if chip not in prices]
  if missing and (prices or values.goal == "cost"):
    raise ConfigError(
      f"give the price of an hour of {missing[0]}: --price={missing[0]}=4.20."
    )
  return prices


def compile_apart(setting: Any, argv: list[str]) -> dict[str, Any]:
  """The report of `argenseg plan` for a setting, in a process of its own.

  Args:
    setting: of `planning.search_space`.
    argv: of the search; its config is the setting's.

  Raises:
    planning.search.CompileError: it ended without one.
  """
  from argenseg_jax.planning.search import CompileError

  topology = setting.topology
  sides = "x".join(map(str, topology.sides))
  done = subprocess.run(
    [
      *(sys.executable, "-m", "argenseg_jax.tools.cli", "plan", "--json"),
      f"--topology={topology.name}:{sides}",
      f"--slices={topology.slices}",
      *_without_own(argv),
      *setting.flags,
    ],
    capture_output=True,
    text=True,
  )
  if done.returncode not in (0, 1):
    lines = done.stderr.strip().splitlines()
    last = lines[-1] if lines else "no message"
    raise CompileError(f"exit code {done.returncode}: {last}")
  try:
    (report,) = json.loads(done.stdout)
  except ValueError as error:
    raise CompileError("its process printed no report.") from error
  return report


def _without_own(argv: list[str]) -> list[str]:
  """What says which config a search was given."""
  found, skip = [], False
  for argument in argv:
    name, equals, _ = argument.lstrip("-").partition("=")
    if skip or name in _SWITCHES:
      skip = False
    elif name in (*_FLAGS, "topology", "slices", "what"):
      skip = not equals
    else:
      found.append(argument)
  return found


def describe(found: Mapping[str, Any]) -> str:
  """A search for people."""
  outcomes = found["compiled"]
  count = {
    state: sum(o["state"] == state for o in outcomes)
    for state in ("fits", "too large", "failed")
  }
  lines = [
    f"{found['what']}: {found['settings']} settings, of which "
    f"{found['too_large_by_count']} need more than {found['memory']:.0%} of a "
    "device's memory by what can be counted; "
    f"{sum(found['refused'].values())} more cannot be built",
    f"compiled: {len(outcomes)} ({sum(o['kept'] for o in outcomes)} kept from "
    f"earlier calls): {count['fits']} fit, {count['too large']} do not, "
    f"{count['failed']} failed",
    "",
    *_rows(outcomes, found["unit"]),
  ]
  for title, index in found["best"].items():
    best = outcomes[index]
    lines += ["", f"{title}: {best['setting']}"]
    lines += [f"  {flag}" for flag in best["flags"]]
    if not best["flags"]:
      lines.append("  (no flags: the config as it is)")
    if best["gives_up"]:
      lines.append(f"  changes the numbers: {', '.join(best['gives_up'])}")
  if not found["best"]:
    lines += ["", "nothing that was compiled fits; try --goal=fit."]
  return "\n".join(lines)


def _rows(outcomes: list[dict[str, Any]], unit: str) -> list[str]:
  head = [f"{unit}/s, at most", "MFU", "measured", "peak", "cost", "setting"]
  table = [head]
  for o in outcomes:
    shares = o.get("mfu_at_measured_shares")
    table.append(
      [
        f"{o['speed']:,.0f}" if "mfu" in o else "",
        f"{o['mfu']:.0%}" if "mfu" in o else "",
        f"{shares[0]:.0%} to {shares[1]:.0%}" if shares else "",
        gib(o["peak"]) if "peak" in o else o["state"],
        f"{o['cost']:.3f}" if "cost" in o else "",
        o["setting"] + (f" ({o['error']})" if o["error"] else ""),
      ]
    )
  used = [i for i, name in enumerate(head) if any(r[i] for r in table[1:])]
  widths = {i: max(len(row[i]) for row in table) for i in used}
  return [
    "  ".join(
      row[i].ljust(widths[i]) if i == len(head) - 1 else row[i].rjust(widths[i])
      for i in used
    ).rstrip()
    for row in table
  ]
