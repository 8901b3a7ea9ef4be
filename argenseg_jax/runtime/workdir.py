"""A work directory belongs to one config and to one run at a time."""

import contextlib
import json
from typing import Any

from argenseg_jax import config as config_lib
from argenseg_jax import config_parsing
from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.runtime import distributed, lock, paths
from argenseg_jax.runtime.paths import Path, is_local


def held(workdir: Path):
  """One process of a run locks its work directory for all of them."""
  in_bucket = not is_local(workdir)  # There it may take a minute.
  if distributed.is_main():
    return lock.owned(workdir, distributed.agree if in_bucket else bool)
  while in_bucket and not distributed.agree(False):
    pass
  return contextlib.nullcontext()


def claim(
  config: RunConfig,
  workdir: Path,
  *,
  accept_changed_data: bool = False,
) -> None:
  """Writes `config.json`; refuses a directory of another config.

  Settings that leave every batch as it was may differ.

  Args:
    config: of the run.
    workdir: of the run.
    accept_changed_data: let data settings and the global batch size differ.
  """
  path = workdir / "config.json"
  mine = config_parsing.to_dict(config)
  if path.exists():
    theirs = _read(path)
    if theirs == mine:
      return
    differences = sorted(_differences(theirs, mine))
    keys = [key for key in differences if not _is_speed(key)]
    if keys and not (accept_changed_data and all(map(_is_of_data, keys))):
      also = ""
      if all(map(_is_of_data, keys)):
        also = ", or accept the change with --accept_changed_data"
      raise ConfigError(
        f"work directory {workdir} belongs to another config (it differs in "
        f"{', '.join(keys[:5])}); give another directory or that config{also}."
      )
  distributed.wait_for_all("claim")  # All have looked before one writes.
  if distributed.is_main():
    workdir.mkdir(parents=True, exist_ok=True)
    paths.write_whole(path, json.dumps(mine, indent=1))


def _is_speed(key: str) -> bool:
  section, _, name = key.partition(".")
  return section == "data" and name in config_lib.SPEED_KEYS


def _is_of_data(key: str) -> bool:
  """Whether a saved data state can be gone on with once this key changed."""
  if key.endswith(".train.global_batch_size"):
    return True
  return key.startswith("data.") and key != "data.warmup_steps"


def _read(path: Path) -> Any:
  try:
    return json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise ConfigError(
      f"{path} is damaged ({error}); delete it if the directory is of this "
      "config."
    ) from error


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
  if isinstance(a, dict) and isinstance(b, dict):
    found = []
    for key in a.keys() | b.keys():
      name = f"{where}.{key}" if where else key
      found += _differences(a.get(key), b.get(key), name)
    return found
  return [] if a == b else [where]
