"""From nothing to a mask: data, image tokenizer, decoder, evaluation."""

import dataclasses
import importlib.metadata
import json
import pathlib
import time
from typing import Any

from flax import nnx

from argenseg_jax import checkpoint
from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.data.ref_shapes import builder
from argenseg_jax.evaluation import report as evaluation_report
from argenseg_jax.evaluation.evaluator import Evaluator, evaluate_checkpoint
from argenseg_jax.runtime import cpu, lock, paths, preemption
from argenseg_jax.runtime import workdir as workdir_lib
from argenseg_jax.runtime.metric_writer import Progress
from argenseg_jax.training import loop
from argenseg_jax.visualize import render

# In a work directory, beside what every run has there.
_WRITTEN = ("report.html", "report.png", "results.json", "seconds.json")


def run(
  config: RunConfig, workdir: pathlib.Path, *, num_train: int, num_eval: int
) -> dict[str, Any]:
  """Runs every stage that is not done yet, and returns `results.json`.

  Resumes a run of the same config only; SIGTERM and Ctrl-C stop it in any
  stage.

  Args:
    config: of the training; its `data.path` is set here.
    workdir: gets data, checkpoints, results.json, report.html, report.png.
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
  seconds = _Stopwatch(workdir / "seconds.json")
  with seconds("data"):
    _build(workdir / "data", num_train, num_eval, config.seed, stop)
  with seconds("vqvae"):
    ceiling = loop.train(config, "vqvae", workdir / "vqvae")
  with seconds("mllm"):
    loop.train(
      config, "mllm", workdir / "mllm", init_from=str(workdir / "vqvae")
    )
  with seconds("evaluation"):
    loaded = checkpoint.load(workdir / "mllm")
    graph, state = nnx.split(loaded.model)
    evaluator = Evaluator(graph, config.eval)
    splits = evaluate_checkpoint(config, loaded, evaluator, on_batch=stop.check)
  results = {
    "splits": {name: split.metrics for name, split in splits.items()},
    "tokenizer_ceiling": ceiling,
    "parameters": count_parameters(nnx.state(loaded.model)),
    "seconds": seconds.read(),
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


class _Stopwatch:
  """Seconds of each stage, summed over interrupted calls."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def read(self) -> dict[str, float]:
    found = paths.read_json(self._path) or {}
    return {k: v for k, v in found.items() if isinstance(v, (int, float))}

  def __call__(self, stage: str) -> "_Stopwatch":
    self._stage = stage
    return self

  def __enter__(self):
    self._began = time.monotonic()

  def __exit__(self, *_):
    spent = self.read()
    passed = time.monotonic() - self._began
    spent[self._stage] = round(spent.get(self._stage, 0.0) + passed, 1)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    paths.write_whole(self._path, json.dumps(spent), durable=False)
