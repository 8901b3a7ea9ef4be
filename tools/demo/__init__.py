"""`argenseg demo`: a page in the browser that segments images."""

import argparse
import importlib.util
import os
import pathlib

from argenseg_jax.config import ConfigError
from argenseg_jax.tools import warmup

EPILOG = """\
example:
  argenseg demo --checkpoint=runs/quickstart/mllm

Nothing leaves the machine, and only this machine can open the page, unless
--host or --share says otherwise. Requests of several users are answered in
batches. docs/serving.md says how programs use it. It needs the extra [demo]:
pip install "argenseg_jax[demo]".
"""


def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  if not 1 <= args.batch_size <= 64:
    raise ConfigError(f"--batch_size is {args.batch_size}; give 1 to 64.")
  if not 0 <= args.port <= 65535:
    raise ConfigError(f"--port is {args.port}; give 0 (any free one) to 65535.")
  for name in ("per_minute", "max_megabytes"):
    if getattr(args, name) < 1:
      raise ConfigError(f"--{name} is {getattr(args, name)}; give 1 or more.")
  examples = _examples(args.examples)
  if importlib.util.find_spec("gradio") is None:
    raise ConfigError(
      'argenseg demo needs gradio; run: pip install "argenseg_jax[demo]"'
    )
  # Before gradio is imported: it reports home otherwise.
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
  os.environ["HF_HUB_OFFLINE"] = "1"
  from argenseg_jax.tools.demo import page
  from argenseg_jax.tools.demo.answers import Answerer

  predictor = warmup.open_predictor(args, batch_size=args.batch_size)
  answerer = Answerer(predictor, batch_size=args.batch_size)
  print("compiling what requests will need ...", flush=True)
  answerer.warm_up()
  demo = page.build(answerer, examples)
  page.serve(
    demo,
    host=args.host,
    port=args.port,
    share=args.share,
    per_minute=args.per_minute,
    max_megabytes=args.max_megabytes,
  )
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="argenseg demo",
    description="Serves a page that segments images with a checkpoint.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  warmup.add_model_options(parser)
  parser.add_argument(
    "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in"
  )
  parser.add_argument(
    "--port", type=int, default=7860, help="0 takes any free one"
  )
  parser.add_argument(
    "--share",
    action="store_true",
    help="tunnel the page through gradio's servers to a public address",
  )
  parser.add_argument(
    "--examples", metavar="DIR", help="a folder of images to pick from"
  )
  parser.add_argument(
    "--batch_size", type=int, default=8, help="most requests answered at once"
  )
  parser.add_argument(
    "--per_minute",
    type=int,
    default=60,
    help="most calls a minute of one address",
  )
  parser.add_argument(
    "--max_megabytes", type=int, default=20, help="of an uploaded file"
  )
  return parser


def _examples(folder: str | None) -> list[str]:
  if folder is None:
    return []
  path = pathlib.Path(folder)
  if not path.is_dir():
    raise ConfigError(f"--examples {folder} is no folder.")
  suffixes = (".jpg", ".jpeg", ".png", ".webp")
  found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
  if not found:
    raise ConfigError(f"--examples {folder} contains no image.")
  return list(map(str, found))
