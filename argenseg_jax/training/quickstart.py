"""From nothing to a mask: data, image tokenizer, decoder, evaluation."""

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from argenseg_jax import checkpoint
from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.data import examples
from argenseg_jax.data.ref_shapes import builder
from argenseg_jax.evaluation import report as evaluation_report
from argenseg_jax.evaluation.evaluator import Evaluator, evaluate_checkpoint
from argenseg_jax.runtime import cpu, lock, paths, preemption
from argenseg_jax.runtime import workdir as workdir_lib
from argenseg_jax.runtime.metric_writer import Progress, duration
from argenseg_jax.training import initialize, loop
from argenseg_jax.visualize import contact_sheet, render

# In a work directory, beside what every run has there.
_WRITTEN = (
  "examples.png",
  "report.html",
  "report.png",
  "results.json",
  "seconds.json",
)

# Seconds on two quiet cores (2026-11): of a stage itself, mostly compilation
# and validations, and of each request or step.
_QUIET = {
  "data": (2.0, 0.0005),
  "vqvae": (60.0, 0.125),
  "mllm": (90.0, 0.125),
  "evaluation": (30.0, 0.01),
}
_TELLING = 15.0  # Of these seconds tell how fast this machine is.
_SHOWN = range(0, 15, 3)  # Examples that are drawn before training.


def run(
  config: RunConfig, workdir: pathlib.Path, *, num_train: int, num_eval: int
) -> dict[str, Any]:
  """Runs every stage that is not done yet, and returns `results.json`.

  Resumes a run of the same config only; SIGTERM and Ctrl-C stop it in any
  stage.

  Args:
    config: of the training; its `data.path` is set here.
    workdir: gets data, checkpoints, examples.png, results.json, report.html,
      report.png.
    num_train, num_eval: requests in the training split and the others.

  Raises:
    ConfigError: the work directory holds something else, or a quickstart with
      other settings.
    preemption.Interrupted: after SIGTERM or Ctrl-C.
  """
  path = builder.folder(workdir / "data")
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, path=str(path))
  )
  grace = config.mllm.train.grace_seconds
  with lock.owned(workdir), preemption.listening(grace) as stop:
    _require_ours(workdir)
    saved = checkpoint.newest_steps(workdir, config.tasks)
    done = paths.read_json(workdir / "results.json") if saved else None
    workdir_lib.claim(config, workdir, saved=saved, has_flags=False)
    return done or _run(config, workdir, num_train, num_eval, stop)


def _require_ours(workdir: pathlib.Path) -> None:
  """A folder of something else would lose its files of the same names."""
  found = [name for name in _WRITTEN if (workdir / name).exists()]
  if found and not (workdir / "config.json").exists():
    raise ConfigError(
      f"{workdir} contains a {found[0]} of something else; give a work "
      "directory that is empty or of an earlier quickstart."
    )


def _run(
  config: RunConfig,
  workdir: pathlib.Path,
  num_train: int,
  num_eval: int,
  stop: preemption.Stopping,
) -> dict[str, Any]:
  stage = _Stages(
    workdir / "seconds.json", _remaining(config, workdir, num_train, num_eval)
  )
  with stage("data", f"drawing {num_train:,} requests to train on"):
    _build(workdir / "data", num_train, num_eval, config.seed, stop)
    _draw_examples(config, workdir / "examples.png")
  with stage("vqvae", "training the image tokenizer: masks to codes"):
    ceiling = loop.train(config, "vqvae", workdir / "vqvae")
  with stage("mllm", "training the decoder: requests to codes"):
    loop.train(
      config, "mllm", workdir / "mllm", init_from=str(workdir / "vqvae")
    )
  with stage("evaluation", f"answering {num_eval:,} unseen requests a split"):
    loaded = checkpoint.load(workdir / "mllm")
    graph, state = nnx.split(loaded.model)
    evaluator = Evaluator(graph, config.eval)
    splits = evaluate_checkpoint(config, loaded, evaluator, on_batch=stop.check)
  results = {
    "splits": {name: split.metrics for name, split in splits.items()},
    "tokenizer_ceiling": ceiling,
    "parameters": count_parameters(nnx.state(loaded.model)),
    "seconds": stage.seconds(),
    "seed": config.seed,
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("argenseg_jax", "jax", "flax", "orbax-checkpoint", "grain")
    },
  }
  shown = evaluation_report.write(
    workdir / "report.html",
    title="argenseg quickstart",
    splits=splits,
    evaluator=evaluator,
    state=state,
    tables={
      "Image tokenizer (held out)": {"encode, decode": ceiling},
      "Seconds": {"stage": results["seconds"]},
    },
  )
  render.draw_rows(shown, workdir / "report.png")
  text = json.dumps(results, indent=1)
  paths.write_whole(workdir / "results.json", text)
  return results


def _remaining(
  config: RunConfig, workdir: pathlib.Path, num_train: int, num_eval: int
) -> dict[str, int]:
  """Requests or steps that each stage has before it."""
  asked = num_eval * len(config.eval.splits)
  drawn = builder.folder(workdir / "data").exists()
  saved = checkpoint.newest_steps(workdir, config.tasks)
  steps = {
    name: max(config.stage(name).train.steps - saved.get(name, 0), 0)
    for name in config.tasks
  }
  data = 0 if drawn else num_train + asked
  return {"data": data, **steps, "evaluation": asked}


def _draw_examples(config: RunConfig, path: pathlib.Path) -> None:
  """Writes what the model is about to learn from."""
  model = initialize.model_config(config, None)
  tokenizer = initialize.text_tokenizer(config, model, None)
  rows = examples.make_rows(config.data, model, tokenizer)
  contact_sheet.draw(rows, _SHOWN, path)
  print(f"examples of them: {path}", flush=True)


def _build(
  data: pathlib.Path,
  num_train: int,
  num_eval: int,
  seed: int,
  stop: preemption.Stopping,
) -> None:
  bars = []  # Made once the number of records is known.

  def show(done: int, total: int) -> None:
    stop.check()
    if not bars:
      bars.append(Progress("draw ref_shapes", total))
    bars[0].update(done)

  builder.prepare(
    data,
    num_train=num_train,
    num_eval=num_eval,
    seed=seed,
    workers=cpu.num_cores(),
    on_progress=show,
  )
  for bar in bars:
    bar.close()


def count_parameters(state: nnx.State) -> dict[str, int]:
  """Parameters of each part of the model, and of the whole."""
  counts: dict[str, int] = {}
  for path, leaf in nnx.to_flat_state(state):
    if isinstance(leaf, nnx.Param):
      part = path[0] if path[0] in ("vision", "llm", "vqvae") else "codes"
      counts[part] = counts.get(part, 0) + int(leaf.size)
  return counts | {"total": sum(counts.values())}


class _Stages:
  """Says what each stage does and about how long it will take here; sums up
  their seconds over interrupted calls.

  Args:
    path: of the file with the seconds.
    remaining: requests or steps of each stage, in order.
  """

  def __init__(self, path: pathlib.Path, remaining: Mapping[str, int]):
    self._path = path
    self._names = list(remaining)
    self._quiet = {
      name: _QUIET[name][0] + _QUIET[name][1] * count if count else 0.0
      for name, count in remaining.items()
    }
    self._quiet_so_far = self._took = 0.0  # Of this call's stages.
    print(
      f"about {duration(sum(self._quiet.values()))} on two quiet cores; "
      "interrupted, the same command resumes",
      flush=True,
    )

  def seconds(self) -> dict[str, float]:
    """Of each stage so far."""
    found = paths.read_json(self._path) or {}
    return {k: v for k, v in found.items() if isinstance(v, (int, float))}

  @contextlib.contextmanager
  def __call__(self, stage: str, does: str) -> Iterator[None]:
    number = self._names.index(stage) + 1
    print(
      f"[{number}/{len(self._names)}] {does}, {self._outlook(stage)}",
      flush=True,
    )
    began = time.monotonic()
    try:
      yield
    finally:
      passed = time.monotonic() - began
      self._took += passed
      self._quiet_so_far += self._quiet[stage]
      spent = self.seconds()
      spent[stage] = round(spent.get(stage, 0.0) + passed, 1)
      self._path.parent.mkdir(parents=True, exist_ok=True)
      paths.write_whole(self._path, json.dumps(spent), durable=False)

  def _outlook(self, stage: str) -> str:
    quiet = self._quiet[stage]
    if not quiet:
      return "done already"
    if self._quiet_so_far < _TELLING:
      return f"about {duration(quiet)} on two quiet cores"
    here = quiet * self._took / self._quiet_so_far
    return f"about {duration(here)} at the speed of this machine so far"
