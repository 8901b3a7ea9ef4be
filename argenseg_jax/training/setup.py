"""What a task's run works with: checked and opened before its first step."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, config_parsing, construct, sharding
from argenseg_jax.config import RunConfig, TrainConfig
from argenseg_jax.data import examples, pipeline
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import flops
from argenseg_jax.runtime import distributed, paths, throughput
from argenseg_jax.runtime.paths import Path
from argenseg_jax.runtime.profile import StepTrace
from argenseg_jax.training import initialize
from argenseg_jax.training.state import Described, TrainState, describe
from argenseg_jax.training.step import Step, make_train_step
from argenseg_jax.training.tasks import Evaluate, Task


@dataclasses.dataclass(frozen=True)
class TaskRun:
  """What a task's run works with, whatever step it is at."""

  config: RunConfig
  task: Task
  model: ModelConfig
  mesh: Mesh
  rows: pipeline.RowMaker
  described: Described
  checkpoints: checkpoint.Checkpoints
  base: initialize.Base | None  # Of adapters.

  @property
  def train(self) -> TrainConfig:
    return self.config.stage(self.task.name).train


def open_run(
  config: RunConfig, task: Task, workdir: Path, init_from: str | None
) -> TaskRun:
  """Checks that config, model and data suit each other, and opens them.

  Args:
    config: of the run.
    task: to train.
    workdir: of this task; gets the text tokenizer, and holds checkpoints.
    init_from: a checkpoint to start from.

  Raises:
    ConfigError: they do not suit each other.
    CheckpointError: `init_from` cannot be read.
    DataError: the data cannot be read.
  """
  task.check(config)
  if task.needs_model:
    initialize.require_model(task.name, init_from)
  stage = config.stage(task.name)
  model = initialize.model_config(config, init_from)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_hosts(mesh, stage.train.global_batch_size)

  base = None
  if config.adapters(task.name) is not None:
    base = initialize.open_base(config, task.name, init_from, model, mesh)
  tokenizer = None
  if task.reads_text:
    tokenizer = initialize.text_tokenizer(config, model, init_from)
    if distributed.is_main():
      paths.copy(paths.as_path(tokenizer.name), workdir / "tokenizer.json")
  return TaskRun(
    config=config,
    task=task,
    model=model,
    mesh=mesh,
    rows=examples.make_rows(task.data(config.data), model, tokenizer),
    described=describe(
      *nnx.split(construct.abstract(_constructor(config, task, model))),
      stage,
      num_codes=model.vqvae.num_codes,
      mesh=mesh,
      adapters=config.adapters(task.name),
    ),
    checkpoints=checkpoint.Checkpoints(
      workdir,
      keep=stage.train.keep,
      keep_every=stage.train.keep_every,
      keep_best=stage.train.keep_best,
    ),
    base=base,
  )


def _constructor(
  config: RunConfig, task: Task, model: ModelConfig
) -> Callable[[], nnx.Module]:
  """Makes what the task trains, as it is before the first step."""
  return initialize.constructor(config, task.name, task.model, model)


def restore_or_begin(
  run: TaskRun, workdir: Path, init_from: str | None
) -> tuple[TrainState, dict[str, Any] | None]:
  """The newest good checkpoint and its data state, else the first state.

  Raises:
    CheckpointError: a checkpoint is of another model, or cannot be read.
  """
  latest, base = run.checkpoints.newest_good(), run.base
  if latest is not None and base is not None:
    found = checkpoint.describe(run.checkpoints.directory / str(latest))
    checkpoint.refuse_other_base(
      base.adapters.base_path, base.adapters.base, found
    )
    return run.described.restore(run.checkpoints, latest, base.variables)
  if latest is not None:
    return run.described.restore(run.checkpoints, latest)
  if base is not None:
    if init_from is not None and distributed.is_main():
      initialize.keep_files(init_from, workdir)
    return run.described.begin(base.variables), None
  make = _constructor(run.config, run.task, run.model)
  _, variables = sharding.create_sharded(make, run.mesh)
  if init_from is not None:
    variables = initialize.fill(variables, init_from, run.task.model, run.mesh)
    if distributed.is_main():
      initialize.keep_files(init_from, workdir)
  return run.described.begin(variables), None


def compiled_steps(run: TaskRun) -> dict[bool, Step]:
  """The step while the task is warm, and after that; compiled when called."""
  return {
    warm: jax.jit(
      make_train_step(
        run.described.graph,
        run.described.optimizer,
        run.config,
        run.task,
        mesh=run.mesh,
        warm=warm,
      ),
      donate_argnums=0,
      out_shardings=(run.described.shardings, None),
      compiler_options=sharding.compiler_options(run.mesh),
    )
    for warm in (True, False)
  }


def evaluation(run: TaskRun) -> Evaluate | None:
  """What is measured every `train.eval_every` steps, if anything is."""
  if not run.train.eval_every:
    return None
  return run.task.evaluation(run.described.graph, run.config, run.rows)


def pace(run: TaskRun, *, start: int) -> throughput.Pace:
  """Measures how fast the run goes, from its step `start` on."""
  data, stage = run.rows.config, run.config.stage(run.task.name)
  count = flops.train_step(
    run.task.products(run.model, data, run.config),
    stage,
    constant=run.task.constant,
    adapters=run.config.adapters(run.task.name),
  )
  return throughput.Pace(
    flops=count.model,
    tokens=stage.train.global_batch_size * data.sequence_length,
    mesh=run.mesh,
    start=start,
  )


def step_trace(run: TaskRun, logs: pathlib.Path) -> StepTrace:
  """Traces what `train.profile_steps` says, beside the task's TensorBoard
  events."""
  train, several = run.train, jax.process_count() > 1
  writes = train.profile_processes == "all" or distributed.is_main()
  return StepTrace(
    logs / "tensorboard",
    train.profile_steps if writes else (),
    name="train",
    process=jax.process_index() if several else None,
  )


def checkpoint_meta(run: TaskRun) -> dict[str, Any]:
  """What checkpoints say of themselves."""
  meta = {
    "task": run.task.model,
    "model": config_parsing.to_dict(run.model),
    "run": config_parsing.to_dict(run.config),
  }
  if run.base is not None:
    meta["adapters"] = config_parsing.to_dict(run.base.adapters)
  return meta
