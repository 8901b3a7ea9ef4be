"""The training loop: image tokenizer and decoder are two tasks of it."""

import contextlib
import json
import pathlib
import shutil
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from argenseg_jax import checkpoint, sharding, starting, tokenizer_training
from argenseg_jax import config as config_lib
from argenseg_jax import rows as rows_lib
from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.data import pipeline
from argenseg_jax.data.curriculum import Curriculum
from argenseg_jax.evaluate import (
  Evaluator,
  evaluate_checkpoint,
  tokenizer_ceiling,
)
from argenseg_jax.monitor import MetricsWriter, Progress
from argenseg_jax.optimizer import make_optimizer, trainable_filter
from argenseg_jax.train_step import TrainState, make_train_step

INTERRUPTED = 3  # Exit code of a run that was told to stop and has saved.


class Interrupted(Exception):
  """SIGTERM came; everything is saved."""


def run(config: RunConfig, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Runs every task of a config, going on where an earlier call stopped.

  Args:
    config: the run.
    workdir: gets `config.json`, a folder for each task and, once the decoder
      has trained, `results.json` with its metrics on every split.

  Returns:
    The final metrics of each task.

  Raises:
    ConfigError: the directory belongs to another config, or a key is wrong.
    Interrupted: after SIGTERM, once a checkpoint is complete.
  """
  workdir = pathlib.Path(workdir)
  claim(config, workdir)
  results, init_from = {}, config.init_from
  for task in config.tasks:
    results[task] = train(config, task, workdir / task, init_from=init_from)
    init_from = str(workdir / task)
  scores = workdir / "results.json"
  if "mllm" in config.tasks and not scores.exists():
    loaded = checkpoint.load(workdir / "mllm")
    splits = evaluate_checkpoint(config, loaded)
    metrics = {split: result.metrics for split, result in splits.items()}
    scores.write_text(json.dumps(metrics, indent=1))
    for split, values in metrics.items():
      print(f"{split}: cIoU {values['ciou']:.3f} gIoU {values['giou']:.3f}")
  return results


def claim(config: RunConfig, workdir: pathlib.Path) -> None:
  """Writes `config.json`; refuses a directory of another config."""
  path = workdir / "config.json"
  mine = config_lib.to_dict(config)
  if path.exists():
    theirs = json.loads(path.read_text())
    if theirs != mine:
      keys = ", ".join(sorted(_differences(theirs, mine))[:5])
      raise ConfigError(
        f"work directory {workdir} belongs to another config (it differs in "
        f"{keys}); give another directory or that config."
      )
    return
  workdir.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(mine, indent=1))


def train(
  config: RunConfig,
  task: str,
  workdir: pathlib.Path,
  *,
  init_from: str | None = None,
) -> dict[str, float]:
  """Trains one task to its last step; measures an image tokenizer's ceiling.

  Args:
    config: the run.
    task: "vqvae" or "mllm".
    workdir: of this task: checkpoints, metrics, `results.json`.
    init_from: a checkpoint to start from; an image tokenizer's fills that part
      of a whole model.

  Returns:
    Final metrics; read back when the task is done already.
  """
  done = workdir / "results.json"
  if done.exists():
    return json.loads(done.read_text())
  workdir.mkdir(parents=True, exist_ok=True)
  stage = config.stage(task)
  model_config = starting.model_config(config, init_from)
  mesh = sharding.make_mesh(config.mesh)

  tokenizer = starting.text_tokenizer(config, model_config, init_from)
  shutil.copyfile(tokenizer.name, workdir / "tokenizer.json")
  rows = rows_lib.make_rows(config.data, task, model_config, tokenizer)
  graph, variables = sharding.create_sharded(
    checkpoint.model_factory(
      task,
      model_config,
      seed=config.seed,
      dtype=jnp.dtype(stage.train.compute_dtype),
      param_dtype=jnp.dtype(stage.train.param_dtype),
    ),
    mesh,
  )
  if init_from is not None:
    variables = starting.fill(variables, init_from, task, mesh)
    starting.keep_files(init_from, workdir)
  thaws = task == "mllm" and "vqvae" not in stage.optimizer.frozen
  if config.data.cache_codes and thaws:
    raise ConfigError(
      "config key 'data.cache_codes' needs a frozen image tokenizer; add "
      "'vqvae' to mllm.optimizer.frozen."
    )
  vqvae = nnx.merge(graph, variables).vqvae if task == "mllm" else None
  batches = _batches(config, rows, vqvae, workdir)
  trains = trainable_filter(stage.optimizer, variables)
  graph, params, fixed = nnx.split(nnx.merge(graph, variables), trains, ...)
  optimizer = make_optimizer(stage.optimizer, stage.train.steps, params)

  def everywhere(x):
    return jax.device_put(x, sharding.replicated(mesh))

  state = TrainState(
    step=everywhere(jnp.zeros((), jnp.int32)),
    params=params,
    fixed=fixed,
    # Moments take the shardings of their parameters; other leaves have none.
    optimizer=jax.tree.map(
      lambda x: x if isinstance(x.sharding, NamedSharding) else everywhere(x),
      optimizer.init(params),
    ),
    usage=everywhere(jnp.zeros((model_config.vqvae.num_codes,), jnp.int32)),
  )

  checkpoints = checkpoint.Checkpoints(workdir, keep=stage.train.keep)
  meta = {
    "task": task,
    "model": config_lib.to_dict(model_config),
    "run": config_lib.to_dict(config),
  }
  if (latest := checkpoints.latest_step()) is not None:
    state, data_state = _restore(checkpoints, latest, state)
    batches.set_state(data_state)

  def save():
    checkpoints.save(
      int(state.step),
      nnx.merge_state(state.params, state.fixed),
      (state.step, state.optimizer, state.usage),
      meta | {"data": batches.state()},
    )

  make_step = {
    quantize: jax.jit(
      make_train_step(graph, optimizer, config, task, quantize=quantize),
      donate_argnums=0,
    )
    for quantize in (True, False)
  }
  if task == "mllm":
    evaluator = Evaluator(graph, config.eval)
  warm = config.tokenizer_training.warm_start_steps if task == "vqvae" else 0
  writer = MetricsWriter(workdir, active=jax.process_index() == 0)
  bar = Progress(
    f"train {task}",
    stage.train.steps,
    start=int(state.step),
    active=jax.process_index() == 0,
  )
  pending = None  # Metrics on their way from the device.
  began, began_step = time.monotonic(), int(state.step)
  step = began_step
  with _stop_on_sigterm() as told_to_stop, contextlib.closing(batches):
    while step < stage.train.steps:
      batch = sharding.put_batch(next(batches), mesh)
      state, metrics = make_step[step >= warm](state, batch)
      step += 1
      if task == "vqvae":
        state = _maintain(config, graph, state, step, rows)
      if pending is not None:
        values = _as_floats(jax.device_get(pending))
        values["steps_per_second"] = (step - 1 - began_step) / (
          time.monotonic() - began
        )
        writer.write(step - 1, values)
        bar.update(step - 1, f"loss {values['loss']:.3f}")
        pending = None
      if step % stage.train.log_every == 0:
        pending = metrics
      last = step == stage.train.steps
      every = stage.train.eval_every
      if task == "mllm" and every and step % every == 0 and not last:
        variables = nnx.merge_state(state.params, state.fixed)
        split = config.eval.splits[0]
        values = evaluator(
          variables, rows_lib.of_split(rows, split), max_samples=200
        ).metrics
        writer.write(step, {f"{split}/{k}": v for k, v in values.items()})
        bar.update(step, f"{split} cIoU {values['ciou']:.3f}")
      if step % stage.train.save_every == 0 or last or told_to_stop():
        save()
      if told_to_stop() and not last:
        checkpoints.wait()
        raise Interrupted(f"stopped at step {step}; a later call goes on.")
  bar.update(step)
  bar.close()
  checkpoints.wait()
  checkpoints.close()

  variables = nnx.merge_state(state.params, state.fixed)
  if task == "vqvae":
    results = tokenizer_ceiling(
      graph,
      variables,
      rows_lib.of_split(rows, config.eval.splits[0]),
      batch_size=64,
      max_samples=config.eval.max_samples,
    )
    print(f"image tokenizer ceiling: cIoU {results['ciou']:.3f}", flush=True)
  else:
    results = {"steps": step}
  results["bad_records"] = batches.num_bad_records
  writer.write(step, {f"final/{k}": v for k, v in results.items()})
  writer.close()
  done.write_text(json.dumps(results, indent=1))
  return results


def _batches(config, rows, vqvae, workdir: pathlib.Path):
  """Training batches of this host. The decoder's (those with a `vqvae`) may
  hold codes instead of masks and begin with an easier split."""
  task = "mllm" if vqvae else "vqvae"

  def iterate(rows, name):
    if vqvae and config.data.cache_codes:
      rows = rows_lib.tokenized(rows, vqvae, workdir / f"codes_{name}.npy")
    return pipeline.TrainIterator(
      rows,
      config.stage(task).train.global_batch_size,
      host_index=jax.process_index(),
      host_count=jax.process_count(),
      on_bad_record=lambda index, why: _note_bad(
        workdir / "bad_records.jsonl", index, why
      ),
    )

  main = iterate(rows, "main")
  steps = config.data.warmup_steps
  if not (vqvae and steps):
    return main
  easy = rows_lib.of_split(rows, config.data.warmup_split, evaluation=False)
  return Curriculum(iterate(easy, "warmup"), main, steps)


def _restore(checkpoints, step, state):
  variables = nnx.merge_state(state.params, state.fixed)
  counters = (state.step, state.optimizer, state.usage)
  variables, counters, meta = checkpoints.restore(step, variables, counters)
  return TrainState(
    step=counters[0],
    params=_part_of(variables, state.params),
    fixed=_part_of(variables, state.fixed),
    optimizer=counters[1],
    usage=counters[2],
  ), meta["data"]


def _maintain(config, graph, state, step, rows):
  """What an image tokenizer needs between steps: a codebook that starts on the
  data, revival of dead codes, costs that follow the codes' frequencies."""
  settings = config.tokenizer_training
  last = config.vqvae.train.steps
  starts = settings.kmeans_iterations and step == settings.warm_start_steps
  quantized = step - settings.warm_start_steps
  revives = (
    settings.revive_every
    and quantized > 0
    and quantized % settings.revive_every == 0
    and step <= settings.revive_until
  )
  counts = settings.entropy_weight and (
    step == last
    or (
      step >= max(settings.entropy_from, 1)
      and step % settings.entropy_every == 0
    )
  )
  if not (starts or revives or counts):
    return state
  model = nnx.merge(graph, state.params, state.fixed)
  key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
  few = 32  # Masks whose vectors dead codes move to.
  count = settings.kmeans_seg_masks if starts or counts else few
  images = rows_lib.sample_seg_masks(rows, count, first=step * 64)
  if starts:
    tokenizer_training.start_codebook(
      model, images, key=key, iterations=settings.kmeans_iterations
    )
  if revives:
    tokenizer_training.revive_codes(model, images[:few], state.usage, key)
    state = state._replace(usage=jnp.zeros_like(state.usage))
  if counts:
    tokenizer_training.constrain_entropy(
      model, images, weight=settings.entropy_weight
    )
  return _with_model(state, model)


def _with_model(state: TrainState, model: nnx.Module) -> TrainState:
  variables = nnx.state(model)
  return state._replace(
    params=_part_of(variables, state.params),
    fixed=_part_of(variables, state.fixed),
  )


def _part_of(variables: nnx.State, part: nnx.State) -> nnx.State:
  """The variables that stand at the paths of `part`."""
  flat = dict(nnx.to_flat_state(variables))
  return nnx.from_flat_state(
    [(path, flat[path]) for path, _ in nnx.to_flat_state(part)]
  )


@contextlib.contextmanager
def _stop_on_sigterm():
  """Yields a function that tells whether SIGTERM came."""
  came = []
  try:
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
  except ValueError:  # Not the main thread: nobody sends signals here.
    yield lambda: False
    return
  try:
    yield lambda: bool(came)
  finally:
    signal.signal(signal.SIGTERM, before)


def _as_floats(metrics: dict[str, np.ndarray]) -> dict[str, float]:
  values = {}
  for name, value in metrics.items():
    if np.ndim(value):
      values |= {f"{name}/{i}": float(v) for i, v in enumerate(value)}
    else:
      values[name] = float(value)
  return values


def _note_bad(path: pathlib.Path, index: int, why: str) -> None:
  print(f"bad record {index}: {why}", flush=True)
  with path.open("a") as file:
    file.write(json.dumps({"record": index, "why": why}) + "\n")


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
  if isinstance(a, dict) and isinstance(b, dict):
    found = []
    for key in a.keys() | b.keys():
      name = f"{where}.{key}" if where else key
      found += _differences(a.get(key), b.get(key), name)
    return found
  return [] if a == b else [where]
