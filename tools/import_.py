"""`argenseg import`: PyTorch weights to a checkpoint."""

import argparse
import sys

EXAMPLE = """\
examples:
  argenseg import --from ARGenSeg-8B --to runs/argenseg_8b
  argenseg import --from InternVL2_5-8B --vqvae vae_ch160v4096z32.pth \\
      --to runs/start
  argenseg import --from vae_ch160v4096z32.pth --to runs/vae

docs/weights.md says what is renamed and how to verify it.
"""


def main(argv: list[str]) -> int:
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
    help="text tokenizer (default: the folder's tokenizer.json); bytes: make "
    "one that reads any text byte by byte, to try things out",
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
  args = parser.parse_args(argv)
  scales = None
  if args.scales:
    try:
      scales = tuple(int(side) for side in args.scales.split(","))
    except ValueError:
      parser.error(f"--scales {args.scales!r} is no list like 1,2,3,4")
  from argenseg_jax.torch_weights.importing import (
    conversion_mesh,
    import_weights,
  )

  imported = import_weights(
    args.source,
    args.target,
    mesh=conversion_mesh(args.fsdp),
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
      "No text tokenizer: train, eval and predict need a tokenizer.json; give "
      "--tokenizer FILE (docs/weights.md says how to make one), or "
      "--tokenizer bytes to try things out.",
      file=sys.stderr,
    )
  return 0
