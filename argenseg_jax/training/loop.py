"""The training loop: image tokenizer and decoder are two tasks of it."""

import contextlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import checkpoint, config_parsing, sharding
from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.data import examples as rows_lib
from argenseg_jax.evaluation.evaluator import (
  Evaluator,
  evaluate_checkpoint,
  headline,
)
from argenseg_jax.evaluation.tokenizer import tokenizer_ceiling
from argenseg_jax.runtime import (
  distributed,
  log_sync,
  paths,
  preemption,
  throughput,
)
from argenseg_jax.runtime import workdir as workdir_lib
from argenseg_jax.runtime.goodput import Goodput
from argenseg_jax.runtime.metric_writer import MetricsWriter, Progress
from argenseg_jax.runtime.nan_guard import NonFinite
from argenseg_jax.runtime.paths import Path
from argenseg_jax.runtime.watchdog import Watchdog
from argenseg_jax.training import codebook_schedule, initialize
from argenseg_jax.training import state as train_state
from argenseg_jax.training.batches import open_batches
from argenseg_jax.training.best_checkpoint import Scores
from argenseg_jax.training.step import make_train_step

LOGS = ("*.jsonl", "stacks*.txt")  # A later call goes on with them.
DIVERGED = 4  # Exit code of a run whose loss stayed NaN or infinite.


def run(
  config: RunConfig,
  workdir: str | Path,
  *,
  accept_changed_data: bool = False,
) -> dict[str, Any]:
  """Runs every task of a config, going on where an earlier call stopped.

  Args:
    config: the run.
    workdir: gets `config.json`, a folder for each task and, once the decoder
      has trained, `results.json` with its metrics on every split. On a disk
      or in a gs:// bucket.
    accept_changed_data: go on although the data are not those of before.

  Returns:
    The final metrics of each task.

  Raises:
    ConfigError: the directory belongs to another config, or a key is wrong.
    DataError: the data changed, or cannot be read.
    stopping.Interrupted: after SIGTERM, once a checkpoint is complete.
    Diverged: too many steps in a row had no finite loss.
  """
  workdir = paths.as_path(workdir)
  grace = config.stage(config.tasks[-1]).train.grace_seconds
  with workdir_lib.held(workdir), preemption.listening(grace) as stop:
    return _run(config, workdir, accept_changed_data, stop)


def _run(
  config: RunConfig,
  workdir: Path,
  accept_changed_data: bool,
  stop: preemption.Stopping,
) -> dict[str, Any]:
  workdir_lib.claim(config, workdir, accept_changed_data=accept_changed_data)
  results, init_from = {}, config.init_from
  for task in config.tasks:
    results[task] = train(
      config,
      task,
      workdir / task,
      init_from=init_from,
      accept_changed_data=accept_changed_data,
    )
    init_from = str(workdir / task)
  scores = workdir / "results.json"
  scored = distributed.agree(scores.exists())
  if "mllm" in config.tasks and not scored:
    loaded = checkpoint.load(workdir / "mllm")
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
  task: str,
  workdir: Path,
  *,
  init_from: str | None = None,
  accept_changed_data: bool = False,
) -> dict[str, float]:
  """Trains one task to its last step; measures an image tokenizer's ceiling.

  Args:
    config: the run.
    task: "vqvae" or "mllm".
    workdir: of this task: checkpoints, metrics, `results.json`.
    init_from: a checkpoint to start from; an image tokenizer's fills that part
      of a whole model.
    accept_changed_data: as in `run`.

  Returns:
    Final metrics; read back when the task is done already.
  """
  done = workdir / "results.json"
  if distributed.agree(done.exists()):
    return json.loads(done.read_text())
  stage = config.stage(task)
  with (
    preemption.listening(stage.train.grace_seconds) as stop,
    log_sync.on_disk(workdir, LOGS) as logs,
  ):
    return _train(
      config, task, workdir, logs, init_from, accept_changed_data, stop
    )


def _train(config, task, workdir, logs, init_from, accept_changed_data, stop):
  """`train`, once it is known that there is something to do."""
  goodput = Goodput()
  workdir.mkdir(parents=True, exist_ok=True)
  main = distributed.is_main()
  stage = config.stage(task)
  model_config = initialize.model_config(config, init_from)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_hosts(mesh, stage.train.global_batch_size)

  tokenizer = initialize.text_tokenizer(config, model_config, init_from)
  if main:
    paths.copy(paths.as_path(tokenizer.name), workdir / "tokenizer.json")
  rows = rows_lib.make_rows(config.data, task, model_config, tokenizer)
  make = checkpoint.model_factory(
    task,
    model_config,
    seed=config.seed,
    dtype=jnp.dtype(stage.train.compute_dtype),
    param_dtype=jnp.dtype(stage.train.param_dtype),
  )
  described = train_state.describe(
    *nnx.split(nnx.eval_shape(make)),
    stage,
    num_codes=model_config.vqvae.num_codes,
    mesh=mesh,
  )
  thaws = task == "mllm" and "vqvae" not in stage.optimizer.frozen
  if config.data.tokenized and thaws:
    raise ConfigError(
      "config keys 'data.cache_codes' and 'data.codes' need a frozen image "
      "tokenizer; add 'vqvae' to mllm.optimizer.frozen."
    )
  checkpoints = checkpoint.Checkpoints(
    workdir,
    keep=stage.train.keep,
    keep_every=stage.train.keep_every,
    keep_best=stage.train.keep_best,
  )
  data_state = None
  if (latest := checkpoints.newest_good()) is not None:
    state, data_state = described.restore(checkpoints, latest)
  else:
    _, variables = sharding.create_sharded(make, mesh)
    if init_from is not None:
      variables = initialize.fill(variables, init_from, task, mesh)
      if main:
        initialize.keep_files(init_from, workdir)
    state = described.begin(variables)
  graph, optimizer = described.graph, described.optimizer
  model = nnx.merge(graph, state.params, state.fixed)
  batches = open_batches(
    config,
    rows,
    model.vqvae if task == "mllm" else None,
    workdir,
    logs=logs,
    accept_changed_data=accept_changed_data,
  )
  if data_state is not None:
    batches.set_state(data_state, force=accept_changed_data)
  meta = {
    "task": task,
    "model": config_parsing.to_dict(model_config),
    "run": config_parsing.to_dict(config),
  }

  def save(step):
    with goodput.spent("save"), watchdog.paused():
      checkpoints.save(
        step,
        state.variables,
        state.counters,
        meta | {"data": data_state},
        score=scores(stage.train.best_by),
      )

  make_step = {
    quantize: jax.jit(
      make_train_step(
        graph, optimizer, config, task, mesh=mesh, quantize=quantize
      ),
      donate_argnums=0,
      out_shardings=(described.shardings, None),
      compiler_options=sharding.compiler_options(mesh),
    )
    for quantize in (True, False)
  }
  if task == "mllm":
    evaluator = Evaluator(graph, config.eval)
  warm = config.tokenizer_training.warm_start_steps if task == "vqvae" else 0
  writer = MetricsWriter(logs, active=main)
  bar = Progress(
    f"train {task}",
    stage.train.steps,
    start=int(state.step),
    active=main,
  )
  pending = None  # Metrics on their way from the device.
  step = int(state.step)
  data_state = batches.state()  # After `step` steps.
  scores = Scores()
  pace = throughput.Pace(config, task, model_config, mesh, start=step)
  non_finite = NonFinite(
    logs / "non_finite.jsonl", stage.train.max_skipped, active=main
  )
  watchdog = Watchdog(
    logs, factor=stage.train.stall_factor, process=jax.process_index()
  )
  compiled = set()
  goodput.started()
  with (
    contextlib.closing(batches),
    contextlib.closing(watchdog),
    contextlib.closing(checkpoints),  # Waits for a save, whatever happens.
  ):
    while step < stage.train.steps:
      try:
        with goodput.spent("data"), stop.interruptible():
          batch = next(batches)
      except preemption.Interrupted:  # While it waited for data.
        save(step)
        checkpoints.wait()
        raise preemption.Interrupted(_stopped_at(step)) from None
      first = (step >= warm) not in compiled
      with goodput.spent("compile") if first else contextlib.nullcontext():
        state, metrics = make_step[step >= warm](
          state, sharding.put_batch(batch, mesh)
        )
      compiled.add(step >= warm)
      step += 1
      data_state = batches.state()
      scores.add_loss(metrics["loss"])
      non_finite.note(step, metrics.pop("skipped"), batch.sample_id)
      if task == "vqvae":
        state = codebook_schedule.maintain(
          config, graph, state, step, rows, mesh
        )
      if pending is not None:
        non_finite.check(step - 1)
        values = _as_floats(jax.device_get(pending))
        values["skipped"] = non_finite.skipped
        writer.write(step - 1, values | pace(step - 1) | goodput())
        bar.update(step - 1, f"loss {values['loss']:.3f}")
        pending = None
      if step % stage.train.log_every == 0:
        pending = metrics
      watchdog.beat(step)
      last = step == stage.train.steps
      every = stage.train.eval_every
      if task == "mllm" and every and step % every == 0 and not last:
        split = config.eval.splits[0]
        with (
          goodput.spent("evaluation"),
          watchdog.paused(),
          contextlib.suppress(preemption.Interrupted),  # It saves below.
        ):
          values = evaluator(
            state.variables,
            rows_lib.of_split(rows, split),
            max_samples=200,
            on_batch=stop.check,
          ).metrics
          scores.ciou = values["ciou"]
          writer.write(step, {f"{split}/{k}": v for k, v in values.items()})
          bar.update(step, f"{split} {headline(values)}")
        pace.pause()
      stops = stop.requested()
      if step % stage.train.save_every == 0 or last or stops:
        save(step)
      if stops and not last:
        checkpoints.wait()
        raise preemption.Interrupted(_stopped_at(step))
    non_finite.check(step)
    checkpoints.wait()
  bar.update(step)
  bar.close()

  if task == "vqvae":
    results = tokenizer_ceiling(
      graph,
      state.variables,
      rows_lib.of_split(rows, config.eval.splits[0]),
      batch_size=64,
      max_samples=config.eval.max_samples,
    )
    if main:
      print(f"image tokenizer ceiling: cIoU {results['ciou']:.3f}", flush=True)
  else:
    results = {"steps": step}
  results["bad_records"] = batches.num_bad_records
  results["cut_records"] = batches.num_cut_records
  writer.write(step, {f"final/{k}": v for k, v in results.items()})
  if main:
    text = json.dumps(results, indent=1)
    paths.write_whole(workdir / "results.json", text)
  distributed.wait_for_all(f"{task} results")
  return results


def _stopped_at(step: int) -> str:
  return f"stopped at step {step}; a later call goes on."


def _as_floats(metrics: dict[str, np.ndarray]) -> dict[str, float]:
  values = {}
  for name, value in metrics.items():
    if np.ndim(value):
      values |= {f"{name}/{i}": float(v) for i, v in enumerate(value)}
    else:
      values[name] = float(value)
  return values
