"""Settings of a run that a search may vary, and what each would change."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from argenseg_jax import config_parsing
from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.models import remat
from argenseg_jax.planning import counted
from argenseg_jax.planning.counted import Counted
from argenseg_jax.planning.topology import Topology
from argenseg_jax.training.optimizer import OPTIMIZERS

# (config, task, topology, value) -> config keys to set.
Changes = Callable[[RunConfig, str, Topology, str], dict[str, Any]]


class Axis(NamedTuple):
  """One thing that settings differ in.

  Attributes:
    help: its values, for people.
    values: that are tried unless others are asked for; none: the config's own.
    changes: what a value changes in a config.
  """

  help: str
  values: tuple[str, ...]
  changes: Changes


def _integer(axis: str, value: str) -> int:
  if not value.isdecimal():
    raise ConfigError(f"--vary={axis}: {value!r} is not a whole number.")
  return int(value)


def _batch(config, task, topology, value):
  """Rows a chip; the run keeps its number of rows."""
  train = config.stage(task).train
  batch = _integer("batch", value) * topology.num_chips
  if not batch:
    raise ConfigError("--vary=batch: a chip needs 1 row or more.")
  ratio = train.global_batch_size / batch
  warmup = config.stage(task).optimizer.warmup_steps
  return {
    f"{task}.train.global_batch_size": batch,
    f"{task}.train.steps": max(round(train.steps * ratio), 1),
    f"{task}.optimizer.warmup_steps": round(warmup * ratio),
  }


def _mesh(config, task, topology, value):
  del config, task, topology
  try:
    data, fsdp, tensor = map(int, value.split("x"))
  except ValueError as error:
    raise ConfigError(
      f"--vary=mesh: {value!r} is no mesh; write DATAxFSDPxTENSOR such as "
      "1x-1x2, with -1 for what is left."
    ) from error
  return {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


def _codes(config, task, topology, value):
  del config, task, topology
  if value not in ("step", "before"):
    raise ConfigError(
      f"--vary=codes: {value!r} is neither 'step' nor 'before'."
    )
  return {"data.cache_codes": value == "before"}


def _key(key: str) -> Changes:
  return lambda config, task, topology, value: {key.format(task=task): value}


AXES = {
  "remat": Axis(
    "what is recomputed: " + ", ".join(remat.POLICIES),
    # Nobody publishes how fast a host's memory is reached.
    tuple(name for name, r in remat.POLICIES.items() if not r.offloads),
    _key("{task}.train.remat"),
  ),
  "batch": Axis("rows of a step for each chip", ("1", "2", "4", "8"), _batch),
  "accumulate": Axis(
    "microbatches of a step",
    ("1", "2", "4"),
    lambda config, task, topology, value: {
      f"{task}.train.accumulate_steps": _integer("accumulate", value)
    },
  ),
  "mesh": Axis(
    "DATAxFSDPxTENSOR within a slice", ("1x-1x1", "1x-1x2", "2x-1x1"), _mesh
  ),
  "param_dtype": Axis(
    "of the weights: float32, bfloat16",
    ("float32", "bfloat16"),
    _key("{task}.train.param_dtype"),
  ),
  "codes": Axis(
    "masks are tokenized in every step, or once before", (), _codes
  ),
  "lora": Axis(
    "rank of adapters that train instead of the weights; 0: none",
    (),
    lambda config, task, topology, value: {
      "lora.rank": _integer("lora", value)
    },
  ),
  "optimizer": Axis(", ".join(OPTIMIZERS), (), _key("{task}.optimizer.name")),
}


class Setting(NamedTuple):
  """One combination of values on one topology.

  Attributes:
    values: axis -> value.
    changes: config keys -> values that differ from the config given.
    config: with these changes.
    task: of the config, that is planned.
    topology: to run on.
    counted: what can be said without compiling.
    gives_up: what it changes in the numbers that a run computes.
  """

  values: Mapping[str, str]
  changes: Mapping[str, Any]
  config: RunConfig
  task: str
  topology: Topology
  counted: Counted
  gives_up: tuple[str, ...]

  @property
  def flags(self) -> list[str]:
    """For `argenseg train` and `argenseg plan`."""
    return [f"--config.{key}={value}" for key, value in self.changes.items()]

  @property
  def name(self) -> str:
    axes = ", ".join(f"{axis} {value}" for axis, value in self.values.items())
    return f"{self.topology}: {axes or 'the config as it is'}"


class Space(NamedTuple):
  """All settings that can be built, and why others cannot.

  Attributes:
    given: the config as it is, on each topology where that can be built.
    settings: all others.
    refused: sentence -> how many combinations it refuses.
  """

  given: list[Setting]
  settings: list[Setting]
  refused: dict[str, int]


def parse_axes(texts: Sequence[str], task: str) -> dict[str, tuple[str, ...]]:
  """Values of each axis, of "AXIS=VALUE,VALUE" and by default.

  Raises:
    config.ConfigError: no such axis, or no values.
  """
  found = {axis: a.values for axis, a in AXES.items() if a.values}
  if task != "vqvae":
    found["codes"] = ("step", "before")
  for text in texts:
    axis, _, values = text.partition("=")
    if axis not in AXES:
      raise ConfigError(
        f"--vary={text}: no axis {axis!r}; use one of {', '.join(AXES)}."
      )
    found[axis] = tuple(v.strip() for v in values.split(",") if v.strip())
    if not found[axis]:
      raise ConfigError(
        f"--vary={text} has no values; write --vary={axis}=VALUE,VALUE "
        f"({AXES[axis].help})."
      )
  return found


def enumerate_settings(
  config: RunConfig,
  task: str,
  topologies: Sequence[Topology],
  axes: Mapping[str, tuple[str, ...]],
) -> Space:
  """Every combination on every topology, counted.

  Args:
    config: to start from.
    task: of it.
    topologies: to run on.
    axes: axis -> values.

  Raises:
    config.ConfigError: a value that no config may have.
  """
  given, settings, refused = [], [], {}
  seen = set()
  for topology in topologies:
    for values in (None, *itertools.product(*axes.values())):
      named = {} if values is None else dict(zip(axes, values, strict=True))
      changes = {}
      for axis, value in named.items():
        changes |= AXES[axis].changes(config, task, topology, value)
      changes = {k: v for k, v in changes.items() if _value(config, k) != v}
      changed = config_parsing.replace(config, changes)
      if (changed, topology) in seen:
        continue
      seen.add((changed, topology))
      try:
        number = counted.count(changed, task, topology)
      except ConfigError as error:
        refused[str(error)] = refused.get(str(error), 0) + 1
        continue
      lost = _gives_up(config, changed, task)
      setting = Setting(named, changes, changed, task, topology, number, lost)
      (given if values is None else settings).append(setting)
  return Space(given, settings, refused)


def _value(config: RunConfig, key: str) -> Any:
  return functools.reduce(getattr, key.split("."), config)


def _gives_up(old: RunConfig, new: RunConfig, task: str) -> tuple[str, ...]:
  """What changes in the numbers that a run computes."""
  before, after = old.stage(task), new.stage(task)
  found = []
  if after.train.global_batch_size != before.train.global_batch_size:
    found.append(
      f"batch {after.train.global_batch_size} for "
      f"{before.train.global_batch_size}"
    )
  if after.train.param_dtype != before.train.param_dtype:
    found.append(f"weights in {after.train.param_dtype}")
  if new.data.tokenized and not old.data.tokenized:
    found.append("masks tokenized before training")
  if new.lora.rank != old.lora.rank:
    found.append(f"adapters of rank {new.lora.rank} train")
  if after.optimizer.name != before.optimizer.name:
    found.append(after.optimizer.name)
  return tuple(found)
