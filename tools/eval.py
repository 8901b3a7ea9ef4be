"""`argenseg eval`: measures a checkpoint on data sets."""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from typing import Any

from argenseg_jax.config import ConfigError, DataConfig, to_dict
from argenseg_jax.tools import data as data_tool

RESULTS = "results.json"


def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  from argenseg_jax import predictions

  if args.rescore:
    _print_table({args.rescore: predictions.rescore(args.rescore)})
    return 0
  if not args.checkpoint:
    raise ConfigError("give --checkpoint=DIR, or --rescore=FILE.")
  from argenseg_jax import checkpoint, distributed
  from argenseg_jax.predict import Predictor

  out = pathlib.Path(args.out) if args.out else None
  if out is not None and (out / RESULTS).exists():
    raise ConfigError(f"{out / RESULTS} exists; give another --out.")
  distributed.initialize()
  loaded = checkpoint.load(args.checkpoint, weights=args.weights or None)
  predictor = Predictor(loaded)  # Knows the data settings and the tokenizer.
  asked = _data_sets(predictor.data, args)
  report: dict[str, Any] = {
    "checkpoint": {"path": str(loaded.path), "sha256": _hash(loaded.path)},
    "model": to_dict(loaded.config),
    "eval": to_dict(predictor.settings) | {"max_samples": args.max_samples},
    "weights": args.weights,
    "data": {name: to_dict(data) for name, data in asked.items()},
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("argenseg_jax", "jax", "flax")
    },
  }
  if out is not None and distributed.is_main():
    _claim(out, report)
  distributed.wait_for_all("claim")
  metrics = {
    name: _measure(predictor, loaded, name, data, args.max_samples, out)
    for name, data in asked.items()
  }
  if distributed.is_main():
    _print_table(
      {f"{n} ({asked[n].protocol})": values for n, values in metrics.items()}
    )
    if out is not None:
      text = json.dumps(report | {"metrics": metrics}, indent=1)
      (out / RESULTS).write_text(text)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="argenseg eval",
    description="Free-running masks on every sample once; docs/evaluation.md "
    "defines each number.",
    epilog="Example: argenseg eval --checkpoint=runs/mine/mllm "
    "--data refer=refcoco:val refer=refcoco:testA --protocol=merged "
    "--out=runs/mine/refcoco, and later "
    "argenseg eval --rescore=runs/mine/refcoco/refcoco_val/predictions.jsonl",
  )
  parser.add_argument("--checkpoint", default="")
  parser.add_argument(
    "--split", default="", help="of the checkpoint's own data"
  )
  parser.add_argument(
    "--data",
    nargs="+",
    default=[],
    metavar="LAYOUT=PATH[:SPLIT]",
    help="data sets instead of the checkpoint's; layouts are those of "
    "docs/data.md",
  )
  parser.add_argument("--root", default="", help="where their pictures are")
  parser.add_argument(
    "--protocol", choices=("merged", "per_expression"), default=None
  )
  parser.add_argument("--max_samples", type=int, default=0)
  parser.add_argument(
    "--weights",
    default="",
    choices=("", "int8", "float8_e4m3fn"),
    help="round the decoder's weights to eight bits first",
  )
  parser.add_argument(
    "--out",
    default="",
    metavar="DIR",
    help="gets results.json and each data set's predictions.jsonl; an "
    "interrupted evaluation goes on there",
  )
  parser.add_argument(
    "--rescore", default="", metavar="FILE", help="score predictions.jsonl"
  )
  return parser


def _data_sets(
  own: DataConfig, args: argparse.Namespace
) -> dict[str, DataConfig]:
  """Data settings by the name that results have."""
  if args.protocol:
    own = dataclasses.replace(own, protocol=args.protocol)
  if not args.data:
    if not own.path:
      raise ConfigError(
        f"checkpoint {args.checkpoint} was not trained here and names no data; "
        "give --data LAYOUT=PATH."
      )
    own = dataclasses.replace(own, split=args.split or own.split)
    return {own.split: own}
  found = {}
  for given in args.data:
    source, _, split = given.rpartition(":")
    if not source or "/" in split:
      source, split = given, args.split
    asked = argparse.Namespace(sources=[source], split=split, root=args.root)
    data = data_tool.one_source(own, asked)
    stem = pathlib.Path(data.path).stem
    name = f"{stem}_{split}" if split else stem
    if name in found:
      raise ConfigError(f"--data names {name} twice.")
    found[name] = data
  return found


def _measure(predictor, loaded, name, data, max_samples, out):
  """The metrics of one data set; its answers go to predictions.jsonl."""
  from flax import nnx

  from argenseg_jax import distributed, predictions, rows
  from argenseg_jax.evaluate import Evaluator
  from argenseg_jax.monitor import Progress

  made = rows.make_rows(data, "mllm", loaded.config, predictor.tokenizer)
  made = rows.of_split(made, data.split)
  total = min(max_samples or len(made.source), len(made.source))
  main = distributed.is_main()
  graph, state = nnx.split(loaded.model)
  evaluate = Evaluator(graph, predictor.settings)
  answered, file = [], None
  if out is not None:
    path = out / name / predictions.FILE
    if main:
      path.parent.mkdir(exist_ok=True)
      predictions.keep_whole_batches(path, predictor.settings.batch_size)
    distributed.wait_for_all(f"{name} answered before")
    answered = [json.loads(line) for line in path.read_text().splitlines()]
    distributed.wait_for_all(f"{name} goes on")
    file = path.open("a") if main else None
  bar = Progress(f"evaluate {name}", total, start=len(answered), active=main)

  def write(record):
    if file is not None:
      file.write(json.dumps(record) + "\n")
      file.flush()

  try:
    result = evaluate(
      state,
      made,
      max_samples=max_samples or None,
      on_progress=lambda done, _, note: bar.update(done, note),
      on_record=write,
      answered=answered,
    )
  finally:
    if file is not None:
      file.close()
  bar.close()
  return result.metrics


def _claim(out: pathlib.Path, report: dict[str, Any]) -> None:
  """Refuses a directory where another evaluation began."""
  path = out / "eval.json"
  if path.exists():
    if json.loads(path.read_text()) != json.loads(json.dumps(report)):
      raise ConfigError(
        f"{out} holds another evaluation, not finished (see {path}); give "
        "another --out or the same arguments."
      )
    return
  out.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(report, indent=1))


def _hash(step: pathlib.Path) -> str:
  """Of the manifest, which holds the hash of every file."""
  from argenseg_jax.integrity import MANIFEST

  path = step / MANIFEST
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _print_table(metrics: dict[str, dict[str, Any]]) -> None:
  for name, values in metrics.items():
    print(name)
    for key, value in values.items():
      text = f"{value:.4f}" if isinstance(value, float) else value
      print(f"  {key:16} {text}")
