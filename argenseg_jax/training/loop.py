"""The training loop: it trains every task of `training/tasks`."""

import contextlib
import json
import pathlib
from typing import Any

import jax
from flax import nnx

from argenseg_jax import checkpoint, config_parsing, sharding
from argenseg_jax.config import RunConfig
from argenseg_jax.data import pipeline
from argenseg_jax.data.curriculum import Curriculum
from argenseg_jax.evaluation.evaluator import evaluate_checkpoint, headline
from argenseg_jax.runtime import (
  distributed,
  log_sync,
  metric_writer,
  paths,
  preemption,
)
from argenseg_jax.runtime import workdir as workdir_lib
from argenseg_jax.runtime.goodput import Goodput
from argenseg_jax.runtime.metric_writer import MetricsWriter
from argenseg_jax.runtime.nan_guard import Diverged
from argenseg_jax.runtime.paths import Path
from argenseg_jax.runtime.profile import StepTrace
from argenseg_jax.runtime.tracker import Tracked
from argenseg_jax.runtime.watchdog import Watchdog
from argenseg_jax.training import setup
from argenseg_jax.training.batches import open_batches
from argenseg_jax.training.best_checkpoint import Scores
from argenseg_jax.training.state import TrainState
from argenseg_jax.training.step_log import StepLog
from argenseg_jax.training.tasks import TASKS, Evaluate, Task

LOGS = ("*.jsonl", "stacks*.txt")  # A resumed run appends to them.
DIVERGED = 4  # Exit code of a run whose loss stayed NaN or infinite.


def run(
  config: RunConfig,
  workdir: str | Path,
  *,
  accept_changed_data: bool = False,
  change_settings: bool = False,
) -> dict[str, Any]:
  """Runs every task of a config, resuming where the previous run left off.

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
  metric_writer.require_trackers(config.tracking)
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
  run = setup.open_run(config, task, workdir, init_from)
  state, data_state = setup.restore_or_begin(run, workdir, init_from)

  graph, train = run.described.graph, run.train
  model = nnx.merge(graph, state.params, state.fixed)
  batches = open_batches(
    config,
    run.rows,
    model.vqvae if task.reads_text else None,
    workdir,
    global_batch_size=train.global_batch_size,
    logs=logs,
    accept_changed_data=accept_changed_data,
    begins=data_state is None,
  )
  del model
  if data_state is not None:
    batches.set_state(data_state, force=accept_changed_data)
  start = int(state.step)
  tracked = Tracked(
    logs,
    start,
    config.tracking,
    f"{workdir.parent.name}/{task.name}",
    config_parsing.to_dict(config),
  )
  writer = MetricsWriter(tracked, active=distributed.is_main())
  log = StepLog(
    f"train {task.name}",
    train,
    logs,
    workdir=workdir,
    writer=writer,
    pace=setup.pace(run, start=start),
    goodput=goodput,
    start=start,
    active=distributed.is_main(),
  )
  watchdog = Watchdog(
    logs, factor=train.stall_factor, process=jax.process_index()
  )
  trace = setup.step_trace(run, logs)
  with contextlib.closing(writer):
    with (
      contextlib.closing(trace),  # Last: its checkpoint is worth more.
      contextlib.closing(batches),
      contextlib.closing(watchdog),
      contextlib.closing(run.checkpoints),  # Waits for a save in any case.
    ):
      state = _take_steps(
        run, state, batches, log, goodput, watchdog, trace, stop
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


def _take_steps(
  run: setup.TaskRun,
  state: TrainState,
  batches: pipeline.TrainIterator | Curriculum,
  log: StepLog,
  goodput: Goodput,
  watchdog: Watchdog,
  trace: StepTrace,
  stop: preemption.Stopping,
) -> TrainState:
  """Trains to the last step, and saves it.

  Raises:
    Interrupted: after SIGTERM, once a checkpoint is complete.
    Diverged: likewise, after too many steps in a row that changed nothing.
  """
  config, task, train = run.config, run.task, run.train
  graph, take = run.described.graph, setup.compiled_steps(run)
  evaluate, meta = setup.evaluation(run), setup.checkpoint_meta(run)
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
    with trace.step(step + 1, before=state):
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
    if trace.ends_with(step):
      with goodput.spent("profile"), watchdog.paused(), log.paused():
        trace.write(after=state)
    try:
      log.dispatched(step, metrics)
    except Diverged:
      save(wait=True)
      raise
    watchdog.beat(step)

    # An evaluation.
    last = step == train.steps
    if evaluate and _is_due(step, train.eval_every) and not last:
      with goodput.spent("evaluation"), watchdog.paused(), log.paused():
        _evaluate(evaluate, run, state, step, log, scores, stop)

    # A checkpoint.
    if (stops := stop.requested()) or last or _is_due(step, train.save_every):
      save()
    if stops and not last:
      run.checkpoints.wait()
      raise preemption.Interrupted(_stopped_at(step))
  log.finish(step)
  run.checkpoints.wait()
  return state


def _evaluate(
  evaluate: Evaluate,
  run: setup.TaskRun,
  state: TrainState,
  step: int,
  log: StepLog,
  scores: Scores,
  stop: preemption.Stopping,
) -> None:
  """Scores the model after a step; SIGTERM ends it early, without a score."""
  with contextlib.suppress(preemption.Interrupted):  # The loop saves.
    results = evaluate(state.variables, stop.check)
    scores.add_ciou(step, results.metrics.get("ciou"))
    log.evaluated(step, run.config.eval.splits[0], results)


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _stopped_at(step: int) -> str:
  return f"stopped at step {step}; the same command resumes."
