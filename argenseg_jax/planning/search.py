"""Which of many settings to compile, what came of each, and the best.

Settings are taken in the order of a goal, as far as it can be counted; one that
cannot fit by what a smaller one showed, or that another equals in speed, memory
and in what is given up, is not compiled, and one that hardly fits waits.
"""

import concurrent.futures
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from argenseg_jax import config_parsing
from argenseg_jax.config import RunConfig
from argenseg_jax.planning import counted
from argenseg_jax.planning.search_space import Setting, Space
from argenseg_jax.training.tasks import TASKS
from argenseg_jax.version import __version__

Goal = Literal["fit", "speed", "cost"]
# Report of `planning.plan` for a setting; raises `CompileError`.
Compile = Callable[[Setting], dict[str, Any]]
_EQUAL = 0.01  # Relative difference of speeds that counts for nothing.


class CompileError(Exception):
  """A setting that could not be compiled, in one sentence."""


class Outcome(NamedTuple):
  """What came of one setting.

  Attributes:
    setting: that was compiled.
    report: of `planning.plan`; None if it failed.
    error: then, why.
    kept: whether the report is of an earlier call.
  """

  setting: Setting
  report: dict[str, Any] | None
  error: str = ""
  kept: bool = False


class Limits(NamedTuple):
  """What a search may use.

  Attributes:
    memory: share of a device's memory, above 0 and up to 1.
    compiled: most settings to compile, those of earlier calls included.
    jobs: compilations at a time.
  """

  memory: float
  compiled: int
  jobs: int


def order(goal: Goal, prices: Mapping[str, float]) -> Callable[[Setting], Any]:
  """A key to sort settings by: the goal as counted, to one percent; then what
  gives up less of `config`, then what needs less memory.

  Args:
    goal: "speed" in tokens a second, "cost" in money a token, "fit" in share
      of memory.
    prices: chip -> money for an hour of it; only "cost" needs them.
  """

  def coarse(value: float) -> int:
    return round(math.log(value) / _EQUAL)

  def of(setting: Setting):
    speed, memory = setting.counted.speed, setting.counted.memory
    if chip := setting.topology.chip:
      memory /= chip.hbm / chip.devices
    changed = len(setting.gives_up)
    if goal == "fit":
      return coarse(memory), changed, -speed
    value = speed
    if goal == "cost":
      value = 1 / _cost(setting, speed, prices)
    return -coarse(value), changed, memory

  return of


def _cost(setting: Setting, speed: float, prices: Mapping[str, float]) -> float:
  """Money for a million tokens at a speed in tokens a second."""
  chips = setting.topology.num_chips
  return prices[setting.topology.name] * chips / 3600 / speed * 1e6


def _speed(outcome: Outcome) -> float:
  """Tokens (or rows) a second that a compiled setting reaches at most; what was
  counted, where no rates are published."""
  report, number = outcome.report, outcome.setting.counted
  if report and "step_seconds" in report:
    return number.items / report["step_seconds"]
  return number.speed


def _allowed(setting: Setting, limits: Limits) -> float:
  """Bytes of a device; infinite where nobody knows."""
  chip = setting.topology.chip
  return limits.memory * chip.hbm / chip.devices if chip else math.inf


def _fits(outcome: Outcome, limits: Limits) -> bool:
  """Whether the compiler needs no more than is allowed."""
  if outcome.report is None or "peak" not in outcome.report:
    return False
  return outcome.report["peak"] <= _allowed(outcome.setting, limits)


def run(
  given: Sequence[Setting],
  settings: Sequence[Setting],
  order: Callable[[Setting], Any],
  compile_setting: Compile,
  *,
  limits: Limits,
  results: pathlib.Path,
  tell: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
  """Compiles the promising settings, `limits.jobs` at a time.

  Args:
    given: compiled first, whatever they are.
    settings: to choose from.
    order: smaller is tried earlier.
    compile_setting: called in threads.
    limits: of the search.
    results: folder that reports are kept in, one file each; what is there is
      not compiled again. Failures are tried again by the next call.
    tell: is told what happens.
  """
  waiting = sorted(
    (s for s in settings if s.counted.memory <= _allowed(s, limits)), key=order
  )
  first = list(given)
  outcomes: list[Outcome] = []
  running: dict[concurrent.futures.Future, Setting] = {}
  results.mkdir(parents=True, exist_ok=True)
  pool = concurrent.futures.ThreadPoolExecutor(limits.jobs)
  try:
    while True:
      while (
        len(running) < limits.jobs
        and len(outcomes) + len(running) < limits.compiled
      ):
        waiting = [s for s in waiting if _promises(s, outcomes, limits)]
        if first:
          setting = first.pop(0)
        elif waiting:
          setting = _likeliest(waiting, outcomes, limits)
          waiting.remove(setting)
        else:
          break
        future = pool.submit(_one, setting, compile_setting, results)
        running[future] = setting
      if not running:
        return outcomes
      done, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in done:
        del running[future]
        outcomes.append(future.result())
        tell(f"[{len(outcomes)}] {_told(outcomes[-1], limits)}")
  finally:
    pool.shutdown(cancel_futures=True)


def _told(outcome: Outcome, limits: Limits) -> str:
  name = outcome.setting.name + (", kept" if outcome.kept else "")
  if outcome.report is None:
    return f"{name}: failed: {outcome.error}"
  if "peak" not in outcome.report:
    return f"{name}: does not fit: {outcome.report['excess']}"
  peak = f"{outcome.report['peak'] / 2**30:.1f} GiB"
  return f"{name}: {peak}" + (
    "" if _fits(outcome, limits) else ", more than is allowed"
  )


def _one(
  setting: Setting, compile_setting: Compile, results: pathlib.Path
) -> Outcome:
  path = results / f"{key(setting)}.json"
  try:
    return Outcome(setting, json.loads(path.read_text())["report"], kept=True)
  except (OSError, ValueError, KeyError):
    pass  # None yet, or half of one.
  began = time.monotonic()
  try:
    report = compile_setting(setting)
  except CompileError as error:
    return Outcome(setting, None, str(error))
  stored = {
    "setting": setting.name,
    "flags": setting.flags,
    "seconds": round(time.monotonic() - began, 1),
    "date": time.strftime("%Y-%m-%d"),
    "versions": _versions(),
    "report": report,
  }
  part = path.with_suffix(f".{os.getpid()}.part")
  part.write_text(json.dumps(stored, indent=1) + "\n")
  part.replace(path)
  return Outcome(setting, report)


def key(setting: Setting) -> str:
  """Of a setting's results: its config, where data lies aside, its topology
  and the versions of what compiles it."""
  config = config_parsing.to_dict(setting.config)
  for name in ("path", "root", "text_tokenizer"):
    del config["data"][name]
  what = [config, str(setting.topology), _versions()]
  text = json.dumps(what, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:24]


def _versions() -> dict[str, str]:
  found = {"argenseg_jax": __version__}
  for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _promises(
  setting: Setting, outcomes: Iterable[Outcome], limits: Limits
) -> bool:
  """Whether compiling may bring what the outcomes have not."""
  for outcome in outcomes:
    other = outcome.setting
    if other.topology != setting.topology or outcome.report is None:
      continue
    if not _fits(outcome, limits):
      if _needs_no_less(setting, other):
        return False
    elif (
      len(other.gives_up) <= len(setting.gives_up)
      and other.counted.speed >= (1 - _EQUAL) * setting.counted.speed
      and other.counted.memory <= setting.counted.memory
    ):
      return False
  return True


def _likeliest(
  waiting: Sequence[Setting], outcomes: Iterable[Outcome], limits: Limits
) -> Setting:
  """The first that fits if the compiler adds to what was counted as little as
  it once did on that topology; else the first."""
  added: dict[Any, int] = {}
  for outcome in outcomes:
    if outcome.report and "peak" in outcome.report:
      more = outcome.report["peak"] - outcome.setting.counted.memory
      name = outcome.setting.topology
      added[name] = min(more, added.get(name, more))

  def likely(setting):
    memory = setting.counted.memory + added.get(setting.topology, 0)
    return memory <= _allowed(setting, limits)

  return next(filter(likely, waiting), waiting[0])


def _needs_no_less(setting: Setting, other: Setting) -> bool:
  """Whether what differs can only add to the memory of `other`."""

  ours, theirs = (s.config.stage(s.task).train for s in (setting, other))
  same = [counted.without_sizes(s.config, s.task) for s in (setting, other)]
  rows = [t.global_batch_size // t.accumulate_steps for t in (ours, theirs)]
  return (
    same[0] == same[1]
    and setting.counted.memory >= other.counted.memory
    and rows[0] >= rows[1]
    and (ours.accumulate_steps > 1) >= (theirs.accumulate_steps > 1)
    and setting.config.data.tokenized <= other.config.data.tokenized
  )


def summary(
  config: RunConfig,
  space: Space,
  outcomes: Sequence[Outcome],
  limits: Limits,
  goal: Goal,
  prices: Mapping[str, float],
) -> dict[str, Any]:
  """A search, JSON-ready: what was compiled, best first, and the best ones.

  Args:
    config: that was given.
    space: that was searched.
    outcomes: of `run`.
    limits: of the search.
    goal: of the search.
    prices: of an hour of each chip; none: costs are left out.
  """
  entries = [_entry(o, limits, prices) for o in outcomes]
  names = {"speed": "speed", "cost": "cost", "fit": "peak"}
  sign = -1 if goal == "speed" else 1

  def rank(entry):
    value = entry.get(names[goal])
    return entry["state"] != "fits", math.inf if value is None else sign * value

  entries.sort(key=rank)
  fitting = [i for i, e in enumerate(entries) if e["state"] == "fits"]
  best = {}
  if fitting:
    best["fastest"] = max(fitting, key=lambda i: entries[i]["speed"])
    if prices:
      best["cheapest"] = min(fitting, key=lambda i: entries[i]["cost"])
    best["least memory"] = min(fitting, key=lambda i: entries[i]["peak"])
  settings = space.settings
  task = (*space.given, *settings)[0].task
  tokens = TASKS[task].data(config.data).sequence_length
  return {
    "what": f"{task} of {config.model.variant or 'the start'}",
    "goal": goal,
    "memory": limits.memory,
    "unit": "tokens" if tokens else "rows",
    "settings": len(settings),
    "too_large_by_count": sum(
      s.counted.memory > _allowed(s, limits) for s in settings
    ),
    "refused": space.refused,
    "compiled": entries,
    "best": best,
  }


def _entry(
  outcome: Outcome,
  limits: Limits,
  prices: Mapping[str, float],
) -> dict[str, Any]:
  setting, report = outcome.setting, outcome.report
  entry = {
    "setting": setting.name,
    "topology": str(setting.topology),
    "values": dict(setting.values),
    "flags": setting.flags,
    "gives_up": list(setting.gives_up),
    "counted_memory": setting.counted.memory,
    "counted_speed": setting.counted.speed,
    "kept": outcome.kept,
    "error": outcome.error,
    "state": "fits" if _fits(outcome, limits) else "too large",
    "speed": _speed(outcome),
  }
  if report is None:
    return entry | {"state": "failed"}
  if prices:
    entry["cost"] = _cost(setting, entry["speed"], prices)
  for name in ("peak", "mfu", "hours", "chip_hours", "collectives"):
    if name in report:
      entry[name] = report[name]
  if "at_measured_shares" in report:
    entry["mfu_at_measured_shares"] = report["at_measured_shares"]["mfu"]
  return entry
