"""`argenseg eval`: measures a checkpoint on data sets."""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from typing import Any

from argenseg_jax import config_parsing
from argenseg_jax.config import ConfigError, DataConfig, EvalConfig, MeshConfig
from argenseg_jax.config_parsing import to_dict
from argenseg_jax.inference import requests
from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path
from argenseg_jax.tools import train as train_tool
from argenseg_jax.tools.data import options

RESULTS = "results.json"
_VERSIONS = ("argenseg_jax", "jax", "flax", "numpy", "pillow", "pycocotools")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the checkpoint's own run, or a config, says of an evaluation."""

  data: DataConfig
  eval: EvalConfig
  mesh: MeshConfig


def main(argv: list[str]) -> int:
  args, config_flags = _parser().parse_known_args(argv)
  if args.rescore:
    from argenseg_jax.evaluation import metrics_table, records

    print(metrics_table.text({args.rescore: records.rescore(args.rescore)}))
    return 0
  out = _checked(args, config_flags)
  from argenseg_jax.runtime import distributed

  distributed.initialize(args.coordinator, args.num_processes, args.process_id)
  with _on_disk(out) as folder:
    _evaluate(args, config_flags, folder)
  return 0


def _on_disk(out: Path | None) -> contextlib.AbstractContextManager:
  """The folder for results, or one that is copied to it."""
  from argenseg_jax.evaluation import records
  from argenseg_jax.runtime import log_sync

  if out is None:
    return contextlib.nullcontext()
  return log_sync.on_disk(out, ("eval.json", f"*/{records.FILE}"))


def _evaluate(
  args: argparse.Namespace, config_flags: list[str], out: pathlib.Path | None
) -> None:
  from argenseg_jax import checkpoint, sharding
  from argenseg_jax.data import file_stamps
  from argenseg_jax.evaluation import metrics_table, resume
  from argenseg_jax.runtime import distributed

  settings = _settings(
    checkpoint.describe(args.adapters or args.checkpoint), config_flags
  )
  loaded = checkpoint.load(
    args.checkpoint,
    mesh=sharding.make_mesh(settings.mesh),
    dtype=args.dtype,
    weights=args.weights or None,
    adapters=args.adapters,
  )
  asked = _data_sets(settings.data, settings.eval.splits, args)
  report: dict[str, Any] = {
    "what": args.what,
    "checkpoint": {"path": str(loaded.path), "sha256": _hash(loaded.path)},
    "model": to_dict(loaded.config),
    "weights": args.weights,
    "dtype": args.dtype,
    "eval": to_dict(settings.eval) | {"max_samples": args.max_samples},
    "data": {name: to_dict(data) for name, data in asked.items()},
    "versions": {n: importlib.metadata.version(n) for n in _VERSIONS},
  }
  rows = _open(loaded, asked, args.what)
  report["fingerprints"] = {
    name: f"{r.fingerprint}-{file_stamps.digest(r.source)}"
    for name, r in rows.items()
  }
  with contextlib.ExitStack() as held:
    if out is not None and distributed.is_main():
      held.enter_context(resume.claimed(out, report, args.out))
    distributed.wait_for_all("claim")
    if args.what == "tokenizer":
      metrics = _measure_tokenizer(loaded, settings, rows, args)
    else:
      metrics = _measure_model(loaded, settings, rows, args, out)
    if distributed.is_main():
      shown = {
        f"{name} ({asked[name].protocol.replace('_', '-')})": values
        for name, values in metrics.items()
      }
      print(metrics_table.text(shown))
      if out is not None:
        rules = metrics_table.rules(metrics)
        text = json.dumps(report | {"metrics": metrics} | rules, indent=1)
        paths.write_whole(out / RESULTS, text)
    distributed.wait_for_all("results")


def _open(loaded, asked: dict[str, DataConfig], what: str) -> dict[str, Any]:
  """The rows of each data set, opened for evaluation.

  Raises:
    ConfigError: the checkpoint cannot be measured so.
  """
  from argenseg_jax import checkpoint
  from argenseg_jax.data import examples

  if what == "tokenizer":
    tokenizer = None  # No text is read.
    asked = {name: examples.masks_only(d) for name, d in asked.items()}
  elif not loaded.is_whole:
    raise ConfigError(
      f"checkpoint {loaded.path} contains an image tokenizer only; measure it "
      "with --what=tokenizer, or give one of a whole model."
    )
  else:
    tokenizer = checkpoint.text_tokenizer(loaded)
  return {
    name: examples.of_split(
      examples.make_rows(data, loaded.config, tokenizer), data.split
    )
    for name, data in asked.items()
  }


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="argenseg eval",
    description="Free-running answers to every sample once; docs/evaluation.md "
    "defines each number. Settings are those of the checkpoint's run; "
    "--config=FILE takes another's, and --config.data.KEY=VALUE, "
    "--config.eval.KEY=VALUE or --config.mesh.KEY=VALUE changes one.",
    epilog="Example: argenseg eval --checkpoint=runs/mine/mllm "
    "--data refer=refcoco:val refer=refcoco:testA --protocol=merged --report "
    "--out=runs/mine/refcoco, and later "
    "argenseg eval --rescore=runs/mine/refcoco/refcoco_val/predictions.jsonl",
    allow_abbrev=False,
  )
  parser.add_argument("--checkpoint", default="")
  parser.add_argument(
    "--adapters",
    metavar="DIR",
    help="adapters that were trained on --checkpoint",
  )
  parser.add_argument(
    "--what",
    choices=("model", "tokenizer"),
    default="model",
    help="tokenizer: only encode and decode masks",
  )
  parser.add_argument(
    "--split",
    default="",
    help="of the checkpoint's own data; else its config's eval.splits",
  )
  parser.add_argument(
    "--data",
    nargs="+",
    default=[],
    metavar="LAYOUT=PATH[:SPLIT]",
    help="data sets instead of the checkpoint's; layouts are those of "
    "docs/data.md",
  )
  parser.add_argument("--root", default="", help="where their images are")
  parser.add_argument(
    "--protocol",
    type=lambda given: given.replace("-", "_"),
    choices=("merged", "per_expression"),
    metavar="merged|per-expression",
    default=None,
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
    "interrupted evaluation resumes there",
  )
  parser.add_argument(
    "--report", action="store_true", help="also a report.html to look at"
  )
  parser.add_argument(
    "--rescore", default="", metavar="FILE", help="score predictions.jsonl"
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="what the model computes in",
  )
  hosts = parser.add_argument_group("hosts that do not find each other")
  hosts.add_argument("--coordinator", default="", metavar="HOST:PORT")
  hosts.add_argument("--num_processes", type=int, default=0)
  hosts.add_argument("--process_id", type=int, default=-1)
  return parser


def _checked(args: argparse.Namespace, config_flags: list[str]) -> Path | None:
  """The folder for results; refuses arguments that do not go together."""
  for flag in config_flags:
    if not flag.startswith(("--config=", "--config.")):
      raise ConfigError(f"unknown argument {flag!r}.")
  if not args.checkpoint:
    raise ConfigError("give --checkpoint=DIR, or --rescore=FILE.")
  if args.max_samples < 0:
    raise ConfigError(
      f"--max_samples is {args.max_samples}; give 0 for all, or a number above."
    )
  if args.report and (not args.out or args.what == "tokenizer"):
    raise ConfigError("--report needs --out=DIR, and a whole model.")
  out = paths.as_path(args.out) if args.out else None
  if out is not None and paths.is_local(out):
    requests.require_folder(out)
  if out is not None and (out / RESULTS).exists():
    raise ConfigError(f"{out / RESULTS} exists; give another --out.")
  return out


def _settings(found, config_flags: list[str]) -> Settings:
  """Of the checkpoint's run or of a config, with changes."""
  if any(flag.startswith("--config=") for flag in config_flags):
    run = train_tool.parse(
      train_tool.config_values(config_flags), config_flags, needs_data=False
    )
    return Settings(run.data, run.eval, run.mesh)
  run = found.meta["run"]
  settings = Settings(
    config_parsing.from_mapping(DataConfig, run["data"]),
    config_parsing.from_mapping(EvalConfig, run["eval"]),
    MeshConfig(data=-1, fsdp=1, tensor=1),  # Whole on each device.
  )
  changes = {}
  for flag in config_flags:
    key, equals, value = flag.removeprefix("--config.").partition("=")
    if not equals or key.split(".")[0] not in vars(settings):
      raise ConfigError(
        f"{flag!r} changes nothing here; write --config.data.KEY=VALUE, "
        "--config.eval.KEY=VALUE or --config.mesh.KEY=VALUE."
      )
    try:
      changes[key] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      changes[key] = value
  return config_parsing.replace(settings, changes)


def _data_sets(
  own: DataConfig, splits: tuple[str, ...], args: argparse.Namespace
) -> dict[str, DataConfig]:
  """Data settings by the name that results have; `splits` are those of `own`
  that are measured where the command line names none."""
  if args.protocol:
    own = dataclasses.replace(own, protocol=args.protocol)
  if not args.data:
    if not own.path:
      raise ConfigError(
        f"checkpoint {args.checkpoint} was not trained here and names no data; "
        "give --data LAYOUT=PATH."
      )
    return {
      split: dataclasses.replace(own, split=split)
      for split in ((args.split,) if args.split else splits or (own.split,))
    }
  found = {}
  for given in args.data:
    source, _, split = given.rpartition(":")
    if not source or "/" in split:
      source, split = given, args.split
    asked = argparse.Namespace(sources=[source], split=split, root=args.root)
    data = options.one_source(own, asked)
    stem = pathlib.Path(data.path).stem
    name = f"{stem}_{split}" if split else stem
    if name in found:  # One folder may hold several layouts.
      name = f"{data.source}_{name}"
    if name in found:
      raise ConfigError(f"--data names {name} twice.")
    found[name] = data
  return found


def _measure_model(loaded, settings, rows, args, out) -> dict[str, dict]:
  """The metrics of each data set; answers go to its predictions.jsonl."""
  from flax import nnx

  from argenseg_jax.evaluation.evaluator import Evaluator

  graph, state = nnx.split(loaded.model)
  evaluator = Evaluator(graph, settings.eval)
  results = {}
  for name, made in rows.items():
    folder = None if out is None else out / name
    results[name] = _answer_all(evaluator, state, made, name, args, folder)
  if args.report and out is not None:
    from argenseg_jax import checkpoint
    from argenseg_jax.evaluation import report as evaluation_report

    evaluation_report.write(
      out / "report.html",
      title=f"{checkpoint.workdir_of(loaded.path).name} at step "
      f"{loaded.path.name}",
      splits=results,
      evaluator=evaluator,
      state=state,
    )
  return {name: result.metrics for name, result in results.items()}


def _answer_all(evaluator, state, made, name, args, folder):
  """Answers what is not answered yet, and scores everything."""
  from argenseg_jax.evaluation import records, resume
  from argenseg_jax.runtime import distributed
  from argenseg_jax.runtime.metric_writer import Progress

  most = args.max_samples or evaluator.max_samples or len(made.source)
  total = min(most, len(made.source))
  main = distributed.is_main()
  answered, file = [], None
  if folder is not None:
    if main:
      folder.mkdir(exist_ok=True)
      path = folder / records.FILE
      size = evaluator.batch_size(state)
      answered = resume.keep_whole_batches(path, size)
      file = path.open("a")
    answered = distributed.gathered(answered)
  start = answered[-1]["sample"] + 1 if answered else 0
  bar = Progress(f"evaluate {name}", total, start=start, active=main)

  def write(record):
    if file is not None:
      file.write(json.dumps(record) + "\n")
      file.flush()

  try:
    result = evaluator(
      state,
      made,
      max_samples=args.max_samples or None,
      on_progress=lambda done, _, note: bar.update(done, note),
      on_record=write,
      answered=answered,
    )
  finally:
    if file is not None:
      file.close()
  bar.close()
  return result


def _measure_tokenizer(loaded, settings, rows, args) -> dict[str, dict]:
  """What an image tokenizer keeps of the masks of each data set."""
  from flax import nnx

  from argenseg_jax.evaluation.tokenizer import tokenizer_ceiling

  model = loaded.model.vqvae if loaded.is_whole else loaded.model
  graph, state = nnx.split(model)
  results = {}
  for name, made in rows.items():
    results[name] = tokenizer_ceiling(
      graph,
      state,
      made,
      batch_size=settings.eval.batch_size,
      max_samples=args.max_samples,
      every_prefix=True,
    )
  return results


def _hash(step: paths.Path) -> str:
  """Of the manifest, which holds the hash of every file."""
  from argenseg_jax.checkpoint.manifest import MANIFEST

  path = step / MANIFEST
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
