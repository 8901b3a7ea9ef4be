"""`argenseg eval`: measures a checkpoint on a data set."""

import argparse
import dataclasses
import json
import pathlib


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg eval",
    description="Free-running masks on every sample once: cIoU, gIoU, "
    "Pr@0.5..0.9, invalid answers, grounding gap.",
    epilog="Example: argenseg eval --checkpoint=runs/quickstart/mllm "
    "--split=testB   (or --data=FILE.jsonl for other pictures)",
  )
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--split", default="", help="of the checkpoint's data")
  parser.add_argument(
    "--data", default="", help="a jsonl file or a ref_shapes folder instead"
  )
  parser.add_argument(
    "--protocol", choices=("merged", "per_expression"), default=None
  )
  parser.add_argument("--max_samples", type=int, default=0)
  parser.add_argument("--out", default="", help="also write results here")
  args = parser.parse_args(argv)
  from flax import nnx

  from argenseg_jax import checkpoint, rows
  from argenseg_jax.config import ConfigError
  from argenseg_jax.evaluate import Evaluator
  from argenseg_jax.monitor import Progress
  from argenseg_jax.predict import Predictor

  out = pathlib.Path(args.out) if args.out else None
  if out is not None and out.exists():
    raise ConfigError(f"{out} exists; give another --out.")
  loaded = checkpoint.load(args.checkpoint)
  predictor = Predictor(loaded)  # Knows the data settings and the tokenizer.
  data = predictor.data
  if args.data:
    source = "ref_shapes" if pathlib.Path(args.data).is_dir() else "jsonl"
    data = dataclasses.replace(data, source=source, path=args.data, root=None)
  if not data.path:
    raise ConfigError(
      f"checkpoint {args.checkpoint} was not trained here and names no data; "
      "give --data=FILE.jsonl."
    )
  if args.protocol:
    data = dataclasses.replace(data, protocol=args.protocol)
  made = rows.make_rows(data, "mllm", loaded.config, predictor.tokenizer)
  split = args.split or data.split
  made = rows.of_split(made, split)
  total = args.max_samples or len(made.source)
  bar = Progress(f"evaluate {split}", min(total, len(made.source)))
  graph, state = nnx.split(loaded.model)
  result = Evaluator(graph, predictor.settings)(
    state,
    made,
    max_samples=args.max_samples or None,
    on_progress=lambda done, _, note: bar.update(done, note),
  )
  bar.close()
  report = {
    "checkpoint": str(loaded.path),
    "data": data.path,
    "split": split,
    "protocol": data.protocol,
    "metrics": result.metrics,
  }
  for name, value in result.metrics.items():
    text = f"{value:.4f}" if isinstance(value, float) else value
    print(f"{name:14} {text}")
  print(f"{'protocol':14} {data.protocol}")
  if out is not None:
    out.write_text(json.dumps(report, indent=1))
  return 0
