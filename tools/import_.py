"""`argenseg import`: PyTorch weights to a checkpoint."""

import argparse
import sys

EXAMPLE = """\
examples:
  argenseg import --from ARGenSeg-8B --to runs/argenseg_8b
  argenseg import --from InternVL2_5-8B --vqvae vae_ch160v4096z32.pth \\
      --to runs/start
  argenseg import --from vae_ch160v4096z32.pth --to runs/vae
  argenseg import --from adapters --base runs/argenseg_8b --to runs/mine

docs/weights.md says what is renamed and how to verify it.
"""


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="argenseg import",
    description="Reads a Hugging Face style folder (or VAR's image tokenizer) "
    "and writes a checkpoint that train, eval and predict open.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--from", dest="source", required=True, metavar="DIR", help="what to read"
  )
  add(
    "--to", dest="target", required=True, metavar="CHECKPOINT", help="to make"
  )
  add("--vqvae", metavar="FILE", help="VAR's image tokenizer, for InternVL2.5")
  add(
    "--tokenizer",
    metavar="FILE",
    help="tokenizer.json (default: the folder's own, or one made from its "
    "tokenizer.model, or from vocab.json and merges.txt); bytes: make one that "
    "reads any text byte by byte, to try things out",
  )
  add(
    "--base",
    metavar="CHECKPOINT",
    help="what the adapters of a PEFT folder adapt",
  )
  add(
    "--scales",
    metavar="1,2,3",
    help="side lengths of the token maps, where config.json has none",
  )
  add(
    "--fsdp",
    type=int,
    default=0,
    metavar="N",
    help="devices that share each parameter (all accelerators, or one CPU)",
  )
  return parser


def main(argv: list[str]) -> int:
  parser = _parser()
  args = parser.parse_args(argv)
  scales = None
  if args.scales:
    try:
      scales = tuple(int(side) for side in args.scales.split(","))
    except ValueError:
      parser.error(f"--scales {args.scales!r} is no list like 1,2,3,4")
  from argenseg_jax.torch_weights import peft_adapters
  from argenseg_jax.torch_weights.importing import (
    conversion_mesh,
    import_weights,
  )

  mesh = conversion_mesh(args.fsdp)
  if peft_adapters.is_peft(args.source):
    if not args.base:
      parser.error(f"{args.source} contains adapters: add --base CHECKPOINT.")
    count = peft_adapters.import_adapters(
      args.source, args.target, base=args.base, mesh=mesh
    )
    print(f"{args.target}: {count} tensors (adapters).")
    return 0
  if args.base:
    parser.error(f"--base is for adapters, and {args.source} contains none.")
  imported = import_weights(
    args.source,
    args.target,
    mesh=mesh,
    vqvae_path=args.vqvae,
    scales=scales,
    text_tokenizer=args.tokenizer,
  )
  print(f"{args.target}: {imported.num_tensors} tensors ({imported.task}).")
  if imported.fresh_image_tokenizer:
    print(
      "The image tokenizer is freshly initialized; give --vqvae FILE to take "
      "VAR's.",
      file=sys.stderr,
    )
  if imported.task == "mllm" and not imported.text_tokenizer:
    print(
      "No text tokenizer: the folder has no tokenizer.json, tokenizer.model or "
      "vocab.json with merges.txt; train, eval and predict need one, so give "
      "--tokenizer FILE, or --tokenizer bytes to try things out.",
      file=sys.stderr,
    )
  return 0
