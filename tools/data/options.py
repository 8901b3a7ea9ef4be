"""What the actions of `argenseg data` share: arguments and settings."""

import argparse
import dataclasses
import pathlib
import typing
from collections.abc import Callable

from argenseg_jax import configs
from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.config_parsing import from_mapping
from argenseg_jax.data.sources import registry
from argenseg_jax.data.text import TextTokenizer
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.tools import train


def parser(
  name: str, description: str, example: str
) -> argparse.ArgumentParser:
  """Arguments that every action takes."""
  made = argparse.ArgumentParser(
    prog=f"argenseg data {name}",
    description=f"{description} Sources are LAYOUT=PATH with a layout of "
    "docs/data.md; without one, what --config=FILE names is taken. Settings "
    "come from that config (--config.data.KEY=VALUE changes them).",
    epilog=f"Example: argenseg data {name} {example}",
  )
  made.add_argument("sources", nargs="*", metavar="LAYOUT=PATH")
  made.add_argument("--split", default="", help="train by default")
  made.add_argument("--root", default="", help="where the images are")
  return made


class Settings(typing.NamedTuple):
  """What rows are made with; rows without text need no text tokenizer."""

  data: DataConfig
  model: ModelConfig
  open_tokenizer: Callable[[], TextTokenizer]


def settings(config_flags: list[str]) -> Settings:
  """Of a config; without one, of the small model with rows that hold whatever
  comes.

  Raises:
    ConfigError: an unknown flag, or what is wrong with the config.
  """
  for flag in config_flags:
    if not flag.startswith("--config"):
      raise ConfigError(f"unknown argument {flag!r}.")
  given = any(flag.startswith("--config=") for flag in config_flags)
  small = pathlib.Path(configs.__path__[0]) / "own_masks.py"
  flags = config_flags if given else [f"--config={small}", *config_flags]
  run = train.parse(train.config_values(flags), flags, needs_data=False)
  from argenseg_jax.training import initialize

  model = initialize.model_config(run, run.init_from)
  data = run.data
  if not given:
    data = dataclasses.replace(
      data,
      max_images=16,
      max_masks=16,
      mask_channels=3,
      sequence_length=8192,
    )
  return Settings(
    data, model, lambda: initialize.text_tokenizer(run, model, run.init_from)
  )


def with_sources(
  data: DataConfig, args: argparse.Namespace
) -> list[DataConfig]:
  """The settings for each source that the arguments name.

  Raises:
    ConfigError: none is named, or not as LAYOUT=PATH.
  """
  changes = {k: getattr(args, k) for k in ("split", "root") if getattr(args, k)}
  data = dataclasses.replace(data, **changes)
  if not args.sources:
    if not data.path:
      raise ConfigError("give a source: LAYOUT=PATH, such as refer=refcoco.")
    return [data]
  found = []
  for given in args.sources:
    layout, equals, path = given.partition("=")
    if not equals or layout not in registry.NAMES:
      raise ConfigError(
        f"source {given!r} is not LAYOUT=PATH; layouts are "
        f"{', '.join(registry.NAMES)}."
      )
    root = data.root if args.root else None
    found.append(dataclasses.replace(data, source=layout, path=path, root=root))
  return found


def one_source(data: DataConfig, args: argparse.Namespace) -> DataConfig:
  """As `with_sources`, where there can be only one."""
  found = with_sources(data, args)
  if len(found) > 1:
    raise ConfigError("this takes one source; give one LAYOUT=PATH.")
  return found[0]


def of_checkpoint(path: str) -> tuple[Settings, typing.Any]:
  """Settings of the run that made a checkpoint, and its image tokenizer."""
  from argenseg_jax import checkpoint
  from argenseg_jax.config import RunConfig
  from argenseg_jax.models.argenseg import ARGenSeg
  from argenseg_jax.training import initialize

  loaded = checkpoint.load(path)
  if isinstance(loaded.model, ARGenSeg):
    data = from_mapping(DataConfig, loaded.meta["run"]["data"])
    settings = Settings(
      data, loaded.config, lambda: checkpoint.text_tokenizer(loaded)
    )
    return settings, loaded.model.vqvae
  run = from_mapping(RunConfig, loaded.meta["run"])
  settings = Settings(
    run.data,
    loaded.config,
    lambda: initialize.text_tokenizer(run, loaded.config, run.init_from),
  )
  return settings, loaded.model
