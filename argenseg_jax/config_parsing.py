"""From an editable `ml_collections.ConfigDict` to the dataclasses of `config`.

`ConfigDict` stops here. `configs/base.py` holds every key of a run with a
comment; an unknown or missing key, a wrong type or a number out of its range is
an error that names the key.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.ranges import Range


def from_mapping(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
  """Builds dataclass `cls` from a mapping, strictly.

  Args:
    cls: a dataclass; nested dataclasses are built from nested mappings.
    values: a mapping, `ConfigDict` included.
    where: dotted name of `values`, for messages.

  Raises:
    ConfigError: an unknown or missing key, a value of the wrong type or a
      number out of the range that its type is annotated with.
  """
  prefix = f"{where}." if where else ""
  if not isinstance(values, Mapping) and not hasattr(values, "items"):
    raise ConfigError(f"config key {where!r} must be a group of keys.")
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      close = difflib.get_close_matches(key, fields, n=1)
      hint = f"; did you mean {prefix + close[0]!r}?" if close else ""
      raise ConfigError(f"unknown config key {prefix + key!r}{hint}")
  built = {}
  for name, field in fields.items():
    if name in values:
      built[name] = _convert(hints[name], values[name], prefix + name)
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ConfigError(f"missing config key {prefix + name!r}")
  return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    return from_mapping(typing.cast(type, hint), value, where)
  if origin is typing.Annotated:
    return _in_range(_convert(arguments[0], value, where), arguments[1], where)
  if origin is Literal:
    if not any(value == a and type(value) is type(a) for a in arguments):
      choices = ", ".join(map(repr, arguments))
      raise ConfigError(f"config key {where!r} is {value!r}; use {choices}.")
    return value
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in arguments:
      return None
    (inner,) = (a for a in arguments if a is not type(None))
    return _convert(inner, value, where)
  if origin is tuple:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
      raise ConfigError(f"config key {where!r} must be a list, got {value!r}")
    return tuple(
      _convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)
    )
  if hint is Any:
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(
      f"config key {where!r} must be {hint.__name__}, got {value!r}"
    )
  return value


def _in_range(value: float, allowed: Range, where: str) -> float:
  if value not in allowed:
    raise ConfigError(f"config key {where!r} is {value!r}; use {allowed}.")
  return value


def to_dict(config: Any) -> dict[str, Any]:
  """The reverse of `from_mapping`, with lists for tuples (JSON-ready)."""

  def plain(value: Any) -> Any:
    if isinstance(value, dict):
      return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
      return [plain(v) for v in value]
    return value

  return plain(dataclasses.asdict(config))


def replace(config: Any, changes: Mapping[str, Any]) -> Any:
  """Returns `config` with dotted keys replaced: {"llm.num_layers": 2}."""
  values = to_dict(config)
  for key, value in changes.items():
    *groups, last = key.split(".")
    node = values
    for group in groups:
      if not isinstance(node.get(group), dict):
        raise ConfigError(f"unknown config key {key!r}")
      node = node[group]
    node[last] = value
  return from_mapping(type(config), values)


def run_config(
  values: Mapping[str, Any], *, needs_data: bool = True
) -> RunConfig:
  """A `RunConfig` from a config file's values, which write "" and 0 for None.

  Args:
    values: of the config file.
    needs_data: whether `data.path` must be set.

  Raises:
    ConfigError: an unknown or missing key, a value out of its range, values
      that contradict each other, or no data.
  """
  plain: dict[str, Any] = to_plain(values)
  plain["init_from"] = plain.get("init_from") or None
  data = plain.get("data", {})
  for key in ("root", "text_tokenizer", "mask_intermediate_side"):
    data[key] = data.get(key) or None
  config = from_mapping(RunConfig, plain)
  if needs_data and not config.data.path:
    raise ConfigError(
      "config key 'data.path' is empty; give --config.data.path."
    )
  if not config.tasks:
    raise ConfigError("config key 'tasks' is empty; use 'vqvae', 'mllm'.")
  for task in config.tasks:
    _require_scores(config, task)
    _require_window(config, task)
  return config


def _require_scores(config: RunConfig, task: str) -> None:
  """Some checkpoint must have what the best are chosen by."""
  train = config.stage(task).train
  if not train.keep_best or train.best_by != "ciou":
    return
  key = f"config key '{task}.train.best_by' is 'ciou', "
  if task == "vqvae" and config.data.mask_channels == 3:
    raise ConfigError(f"{key}which images as targets have not; use 'loss'.")
  both = math.lcm(train.eval_every, train.save_every)
  if not 0 < both < train.steps:
    raise ConfigError(
      f"{key}but no step before the last ({train.steps}) is both evaluated "
      f"(eval_every is {train.eval_every}) and saved (save_every is "
      f"{train.save_every}); make save_every divide eval_every, or use 'loss'."
    )


def _require_window(config: RunConfig, task: str) -> None:
  """What is traced must be two steps of the run, the first one first."""
  train = config.stage(task).train
  window = train.profile_steps
  if window and (len(window) != 2 or not window[0] <= window[1] <= train.steps):
    raise ConfigError(
      f"config key '{task}.train.profile_steps' is {window}; give the first "
      f"and the last step of a trace, from 1 to {train.steps}: (10, 12)."
    )


def to_plain(values: Any) -> Any:
  """`ConfigDict`s as dictionaries, all the way down."""
  if hasattr(values, "items"):
    return {key: to_plain(value) for key, value in values.items()}
  return values
