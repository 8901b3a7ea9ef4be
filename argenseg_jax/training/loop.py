"""The training loop: it trains every task of `training/tasks`."""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, config_parsing, sharding
from argenseg_jax.config import ModelConfig, RunConfig
from argenseg_jax.data import examples, pipeline
from argenseg_jax.data.curriculum import Curriculum
from argenseg_jax.evaluation.evaluator import evaluate_checkpoint, headline
from argenseg_jax.models import flops
from argenseg_jax.runtime import (
  distributed,
  log_sync,
  paths,
  preemption,
  throughput,
)
from argenseg_jax.runtime import workdir as workdir_lib
from argenseg_jax.runtime.goodput import Goodput
from argenseg_jax.runtime.nan_guard import Diverged
from argenseg_jax.runtime.paths import Path
from argenseg_jax.runtime.watchdog import Watchdog
from argenseg_jax.training import initialize
from argenseg_jax.training import state as train_state
from argenseg_jax.training.batches import open_batches
from argenseg_jax.training.best_checkpoint import Scores
from argenseg_jax.training.step import make_train_step
from argenseg_jax.training.step_log import StepLog
from argenseg_jax.training.tasks import TASKS, Task

LOGS = ("*.jsonl", "stacks*.txt")  # A later call goes on with them.
DIVERGED = 4  # Exit code of a run whose loss stayed NaN or infinite.


def run(
  config: RunConfig,
  workdir: str | Path,
  *,
  accept_changed_data: bool = False,
  change_settings: bool = False,
) -> dict[str, Any]:
  """Runs every task of a config, resuming where an earlier call stopped.

  Args:
    config: the run.
    workdir: gets `config.json`, a folder for each task and, if the last one
      trains a whole model, `results.json` with its metrics on every split. On
      a disk or in a gs:// bucket.
    accept_changed_data: resume although the data changed.
    change_settings: resume with other lengths, rates, losses or evaluations.

  Returns:
    The final metrics of each task.

  Raises:
    ConfigError: the directory belongs to another config, or a key is wrong.
    DataError: the data changed, or cannot be read.
    preemption.Interrupted: after SIGTERM, once a checkpoint is complete.
    Diverged: too many steps in a row had no finite loss.
  """
  workdir = paths.as_path(workdir)
  grace = config.stage(config.tasks[-1]).train.grace_seconds
  with workdir_lib.held(workdir), preemption.listening(grace) as stop:
    changed = workdir_lib.claim(
      config,
      workdir,
      saved=checkpoint.newest_steps(workdir, config.tasks),
      accept_changed_data=accept_changed_data,
      change_settings=change_settings,
    )
    workdir_lib.forget_results(workdir, changed)
    return _run(config, workdir, accept_changed_data, stop)


def _run(
  config: RunConfig,
  workdir: Path,
  accept_changed_data: bool,
  stop: preemption.Stopping,
) -> dict[str, Any]:
  results, init_from = {}, config.init_from
  for name in config.tasks:
    results[name] = train(
      config,
      name,
      workdir / name,
      init_from=init_from,
      accept_changed_data=accept_changed_data,
    )
    init_from = str(workdir / name)
  scores = workdir / "results.json"
  scored = distributed.agree(paths.read_json(scores) is not None)
  last = TASKS[config.tasks[-1]]
  if last.reads_text and not scored:
    loaded = checkpoint.load(workdir / last.name)
    splits = evaluate_checkpoint(config, loaded, on_batch=stop.check)
    metrics = {split: result.metrics for split, result in splits.items()}
    if distributed.is_main():
      paths.write_whole(scores, json.dumps(metrics, indent=1))
      for split, values in metrics.items():
        print(f"{split}: {headline(values)}")
    distributed.wait_for_all("results")
  return results


def train(
  config: RunConfig,
  name: str,
  workdir: Path,
  *,
  init_from: str | None = None,
  accept_changed_data: bool = False,
) -> dict[str, float]:
  """Trains one task to its last step; measures an image tokenizer's ceiling.

  Args:
    config: the run.
    name: of the task, a key of `TASKS`.
    workdir: of this task: checkpoints, metrics, `results.json`.
    init_from: a checkpoint to start from; an image tokenizer's fills that part
      of a whole model.
    accept_changed_data: as in `run`.

  Returns:
    Final metrics; read back when the task is done already.
  """
  done = paths.read_json(workdir / "results.json")
  if distributed.agree(done is not None):
    return done or paths.read_json(workdir / "results.json") or {}
  task, train = TASKS[name], config.stage(name).train
  with (
    preemption.listening(train.grace_seconds) as stop,
    log_sync.on_disk(workdir, LOGS) as logs,
  ):
    return _train(
      config, task, workdir, logs, init_from, accept_changed_data, stop
    )


def _train(
  config: RunConfig,
  task: Task,
  workdir: Path,
  logs: pathlib.Path,
  init_from: str | None,
  accept_changed_data: bool,
  stop: preemption.Stopping,
) -> dict[str, float]:
  """`train`, once it is known that there is something to do."""
  goodput = Goodput()
  workdir.mkdir(parents=True, exist_ok=True)
  run = _open(config, task, workdir, init_from)
  state, data_state = _restore_or_begin(run, config, workdir, init_from)

  graph, train = run.described.graph, config.stage(task.name).train
  model = nnx.merge(graph, state.params, state.fixed)
  batches = open_batches(
    config,
    run.rows,
    model.vqvae if task.reads_text else None,
    workdir,
    global_batch_size=train.global_batch_size,
    logs=logs,
    accept_changed_data=accept_changed_data,
  )
  del model
  if data_state is not None:
    batches.set_state(data_state, force=accept_changed_data)
  log = StepLog(
    f"train {task.name}",
    train,
    logs,
    pace=_pace(run, config, start=int(state.step)),
    goodput=goodput,
    start=int(state.step),
    active=distributed.is_main(),
  )
  watchdog = Watchdog(
    logs, factor=train.stall_factor, process=jax.process_index()
  )
  with (
    contextlib.closing(batches),
    contextlib.closing(watchdog),
    contextlib.closing(run.checkpoints),  # Waits for a save, whatever happens.
  ):
    state = _take_steps(
      run, config, state, batches, log, goodput, watchdog, stop
    )

  results = task.finish(graph, state.variables, run.rows, config)
  results["bad_records"] = batches.num_bad_records
  results["cut_records"] = batches.num_cut_records
  log.results(train.steps, results)
  if distributed.is_main():
    text = json.dumps(results, indent=1)
    paths.write_whole(workdir / "results.json", text)
  distributed.wait_for_all(f"{task.name} results")
  return results


@dataclasses.dataclass(frozen=True)
class _Run:
  """What a task's run works with, whatever step it is at."""

  task: Task
  model: ModelConfig
  mesh: Mesh
  rows: pipeline.RowMaker
  described: train_state.Described
  checkpoints: checkpoint.Checkpoints
  base: initialize.Base | None  # Of adapters.


def _open(
  config: RunConfig, task: Task, workdir: Path, init_from: str | None
) -> _Run:
  """Checks that config, model and data suit each other, and opens them."""
  task.check(config)
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
  return _Run(
    task=task,
    model=model,
    mesh=mesh,
    rows=examples.make_rows(task.data(config.data), model, tokenizer),
    described=train_state.describe(
      *nnx.split(nnx.eval_shape(_constructor(config, task, model))),
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


def _constructor(config: RunConfig, task: Task, model: ModelConfig):
  """Makes what the task trains, as it is before the first step."""
  return initialize.constructor(config, task.name, task.model, model)


def _restore_or_begin(
  run: _Run, config: RunConfig, workdir: Path, init_from: str | None
) -> tuple[train_state.TrainState, dict[str, Any] | None]:
  """The newest good checkpoint and its data state, else the first state."""
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
  make = _constructor(config, run.task, run.model)
  _, variables = sharding.create_sharded(make, run.mesh)
  if init_from is not None:
    variables = initialize.fill(variables, init_from, run.task.model, run.mesh)
    if distributed.is_main():
      initialize.keep_files(init_from, workdir)
  return run.described.begin(variables), None


def _pace(run: _Run, config: RunConfig, *, start: int) -> throughput.Pace:
  data, stage = run.rows.config, config.stage(run.task.name)
  count = flops.train_step(
    run.task.products(run.model, data, config),
    stage,
    constant=run.task.constant,
    adapters=config.adapters(run.task.name),
  )
  return throughput.Pace(
    flops=count.model,
    tokens=stage.train.global_batch_size * data.sequence_length,
    mesh=run.mesh,
    start=start,
  )


def _compiled_steps(run: _Run, config: RunConfig) -> dict[bool, Any]:
  """The step while the task is warm, and after that; compiled when called."""
  return {
    warm: jax.jit(
      make_train_step(
        run.described.graph,
        run.described.optimizer,
        config,
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


def _take_steps(
  run: _Run,
  config: RunConfig,
  state: train_state.TrainState,
  batches: pipeline.TrainIterator | Curriculum,
  log: StepLog,
  goodput: Goodput,
  watchdog: Watchdog,
  stop: preemption.Stopping,
) -> train_state.TrainState:
  """Trains to the last step, and saves it.

  Raises:
    Interrupted: after SIGTERM, once a checkpoint is complete.
    Diverged: likewise, after too many steps in a row that changed nothing.
  """
  task, graph = run.task, run.described.graph
  train = config.stage(task.name).train
  take, evaluate = _compiled_steps(run, config), None
  if train.eval_every:
    evaluate = task.evaluation(graph, config, run.rows)
  meta = _meta(run, config)
  step, compiled, scores = int(state.step), set(), Scores()
  data_state = batches.state()  # After `step` steps.

  def save(*, wait: bool = False) -> None:
    with goodput.spent("save"), watchdog.paused():
      run.checkpoints.save(
        step,
        run.described.saved(state),
        state.counters,
        meta | {"data": data_state},
        score=scores(train.best_by, step),
      )
      if wait:
        run.checkpoints.wait()

  goodput.started()
  while step < train.steps:
    # A batch.
    try:
      with goodput.spent("data"), stop.interruptible():
        batch = next(batches)
    except preemption.Interrupted:  # While it waited for data.
      save(wait=True)
      raise preemption.Interrupted(_stopped_at(step)) from None
    data_state = batches.state()

    # A step.
    warm = step < task.warm_steps(config)
    first = warm not in compiled
    with goodput.spent("compile") if first else contextlib.nullcontext():
      state, metrics = take[warm](state, sharding.put_batch(batch, run.mesh))
    compiled.add(warm)
    step += 1
    scores.add_loss(metrics["loss"])
    state = task.between_steps(config, graph, state, step, run.rows, run.mesh)
    try:
      log.dispatched(step, metrics)
    except Diverged:
      save(wait=True)
      raise
    watchdog.beat(step)

    # An evaluation.
    last = step == train.steps
    if evaluate and _is_due(step, train.eval_every) and not last:
      with (
        goodput.spent("evaluation"),
        watchdog.paused(),
        contextlib.suppress(preemption.Interrupted),  # It saves below.
      ):
        values = evaluate(state.variables, stop.check)
        scores.add_ciou(step, values.get("ciou"))
        log.evaluated(step, config.eval.splits[0], values)

    # A checkpoint.
    stops = stop.requested()
    if _is_due(step, train.save_every) or last or stops:
      save()
    if stops and not last:
      run.checkpoints.wait()
      raise preemption.Interrupted(_stopped_at(step))
  log.finish(step)
  run.checkpoints.wait()
  return state


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _meta(run: _Run, config: RunConfig) -> dict[str, Any]:
  """What checkpoints say of themselves."""
  meta = {
    "task": run.task.model,
    "model": config_parsing.to_dict(run.model),
    "run": config_parsing.to_dict(config),
  }
  if run.base is not None:
    meta["adapters"] = config_parsing.to_dict(run.base.adapters)
  return meta


def _stopped_at(step: int) -> str:
  return f"stopped at step {step}; the same command resumes."
