"""`argenseg warmup`: compiles what requests will need, before they come."""

import argparse
import time


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg warmup",
    description="Compiles the programs of `argenseg predict` for each number "
    "of rows and length of prompt, and keeps them in the user's cache "
    "directory. ARGENSEG_COMPILATION_CACHE=DIR names another, =off keeps "
    "nothing.",
    epilog="Example: argenseg warmup --checkpoint=runs/quickstart/mllm "
    "--batches 1 4 --longest 64",
  )
  add_model_options(parser)
  parser.add_argument(
    "--batches", nargs="+", type=int, default=[1], metavar="ROWS"
  )
  parser.add_argument(
    "--longest", type=int, default=64, help="tokens of the longest request"
  )
  parser.add_argument(
    "--one_image",
    action="store_true",
    help="the programs of several requests about one image instead",
  )
  args = parser.parse_args(argv)
  if min(args.batches) < 1 or args.longest < 1:
    parser.error("--batches and --longest must be positive")
  import jax

  predictor = open_predictor(args, batch_size=max(args.batches))
  began = time.perf_counter()
  count = predictor.warm_up(
    batches=args.batches,
    longest=args.longest,
    about_one_image=args.one_image,
    **answer_options(args),
  )
  print(
    f"{count} programs in {time.perf_counter() - began:.1f} s, kept in "
    f"{jax.config.values['jax_compilation_cache_dir'] or 'this process only'}"
  )
  return 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
  """Options that decide which programs run; `predict` has them too."""
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument(
    "--adapters",
    metavar="DIR",
    help="adapters that were trained on --checkpoint",
  )
  parser.add_argument(
    "--answer_prefix",
    metavar="WORDS",
    help="the answer's words, right before its mask; skips generating text "
    '("" for none)',
  )
  parser.add_argument(
    "--num_scales",
    type=int,
    metavar="K",
    help="stop after the first K scales of a mask: quicker and coarser",
  )
  parser.add_argument(
    "--bfloat16", action="store_true", help="keep and use weights in bfloat16"
  )
  parser.add_argument(
    "--weights",
    default="",
    choices=("", "int8", "float8_e4m3fn"),
    help="round the decoder's weights to eight bits first",
  )


def answer_options(args: argparse.Namespace) -> dict:
  return {"answer_prefix": args.answer_prefix, "num_scales": args.num_scales}


def open_predictor(args: argparse.Namespace, *, batch_size: int):
  """The predictor of `--checkpoint`."""
  import dataclasses

  from argenseg_jax import config as config_lib
  from argenseg_jax import config_parsing
  from argenseg_jax.checkpoint import describe
  from argenseg_jax.inference.predictor import Predictor

  run = describe(args.adapters or args.checkpoint).meta["run"]
  settings = config_parsing.from_mapping(config_lib.EvalConfig, run["eval"])
  return Predictor.from_checkpoint(
    args.checkpoint,
    dataclasses.replace(settings, batch_size=batch_size),
    bfloat16=args.bfloat16,
    weights=args.weights or None,
    adapters=args.adapters,
  )
