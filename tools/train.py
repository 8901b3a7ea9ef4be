"""`argenseg train`: trains the tasks of a config."""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import paths

HELP = """\
argenseg train --config=FILE --workdir=DIR [--config.KEY=VALUE ...] [FLAGS]

Trains the tasks of a config in order. Rerun the same command to resume where
the previous run left off.

  --config=FILE           config to train, such as configs/tiny.py (required)
  --config.KEY=VALUE      override one key; configs/base.py explains every key
  --workdir=DIR           checkpoints and logs go here; a folder or gs:// path
                          that every host can see (required)

Resuming: settings that cannot change the numbers (logging, saving, workers,
remat, mesh, accumulate_steps) may differ from the previous run. Others are
refused unless you pass:
  --accept_changed_data   resume on data that is not what the run started with
  --change_settings       resume with other steps, learning rates, losses or
                          evaluations

Multi-host: run the same command on every host. TPU hosts and Slurm tasks find
each other; anywhere else, tell each process where it is (docs/pods.md):
  --coordinator=HOST:PORT address of process 0
  --num_processes=N       how many processes there are
  --process_id=I          number of this process, 0 to N-1
  --start_seconds=300     how long processes wait for each other at startup
  --heartbeat_seconds=100 how long a process may be silent before the others
                          stop with an error

Ctrl-C and SIGTERM save a checkpoint first (exit codes 130 and 3); a second
Ctrl-C stops at once.

Example, on your own masks (one JSON object a line, see docs/own_masks.md):
  argenseg train --config=configs/own_masks.py --workdir=runs/mine \\
    --config.data.path=DIR/annotations.jsonl
"""


def main(argv: list[str]) -> int:
  if not argv or "--help" in argv or "-h" in argv:
    print(HELP)
    return 0
  values = config_values(argv)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  flags.DEFINE_string("coordinator", "", "", flag_values=values)
  flags.DEFINE_integer("num_processes", 0, "", flag_values=values)
  flags.DEFINE_integer("process_id", -1, "", flag_values=values)
  flags.DEFINE_integer("heartbeat_seconds", 100, "", flag_values=values)
  flags.DEFINE_integer("start_seconds", 300, "", flag_values=values)
  flags.DEFINE_boolean("accept_changed_data", False, "", flag_values=values)
  flags.DEFINE_boolean("change_settings", False, "", flag_values=values)
  config = parse(values, argv)
  if not values.workdir:
    raise ConfigError("give a work directory: --workdir=DIR.")
  from argenseg_jax.runtime import cpu, distributed

  cpu.use_all_cores(config)
  distributed.initialize(
    values.coordinator,
    values.num_processes,
    values.process_id,
    values.heartbeat_seconds,
    values.start_seconds,
  )
  from argenseg_jax.runtime import preemption
  from argenseg_jax.runtime.nan_guard import Diverged
  from argenseg_jax.training import loop

  try:
    loop.run(
      config,
      paths.as_path(values.workdir),
      accept_changed_data=values.accept_changed_data,
      change_settings=values.change_settings,
    )
  except preemption.Interrupted as stopped:
    print(f"argenseg train: {stopped}", file=sys.stderr)
    return stopped.code
  except Diverged as error:
    print(f"argenseg train: {error}", file=sys.stderr)
    return loop.DIVERGED
  return 0


def config_values(argv: list[str]) -> flags.FlagValues:
  """Flags that know --config; a file that is not there is refused before
  ml_collections imports it."""
  for argument in argv:
    name, _, path = argument.partition("=")
    if name == "--config" and not pathlib.Path(path).is_file():
      raise ConfigError(f"config file {path} does not exist.")
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", None, flag_values=values, sys_argv=["argenseg", *argv]
  )
  return values


def parse(
  values: flags.FlagValues, argv: list[str], *, needs_data: bool = True
):
  """Parses flags into a `RunConfig`; one sentence for what is wrong."""
  try:
    rest = values(["argenseg", *argv])
  except (
    flags.Error,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
  ) as error:
    message = str(error).strip().splitlines()[0].rstrip(".")
    raise ConfigError(f"{message}; configs/base.py lists every key.") from error
  if len(rest) > 1:
    raise ConfigError(f"unknown argument {rest[1]!r}.")
  if values.config is None:
    raise ConfigError("give a config: --config=configs/FILE.py.")
  from argenseg_jax.config_parsing import run_config
  from argenseg_jax.data.sources import registry

  config = run_config(values.config, needs_data=needs_data)
  registry.require_known(config.data.source)
  return config
