"""`argenseg export`: a checkpoint to PyTorch weights."""

import argparse

EXAMPLE = """\
examples:
  argenseg export --from runs/mine --to ARGenSeg-mine --dtype bfloat16
  argenseg export --from runs/mine --to vae --part vqvae
  argenseg export --from runs/adapters --to adapters --part adapters
  argenseg export --from runs/adapters --to ARGenSeg-mine --merge

docs/weights.md says what is renamed and how to verify it.
"""


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg export",
    description="Writes a checkpoint as a Hugging Face style folder in the "
    "authors' naming and layout.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--from", dest="source", required=True, metavar="CHECKPOINT", help="read")
  add("--to", dest="target", required=True, metavar="DIR", help="to be made")
  add(
    "--dtype",
    choices=("float32", "bfloat16", "float16"),
    help="of all floating-point tensors; each as it is by default",
  )
  add(
    "--part",
    choices=("all", "llm", "vqvae", "adapters"),
    default="all",
    help="the whole model, a part of it, or adapters in PEFT's format",
  )
  add(
    "--merge",
    action="store_true",
    help="add adapters to the weights of their base",
  )
  add(
    "--files_from",
    metavar="DIR",
    help="folder whose config.json, text tokenizer and code go along "
    "(default: what import kept)",
  )
  add("--max_file_gb", type=float, default=5.0, metavar="GB")
  add("--fsdp", type=int, default=0, metavar="N", help="as in import")
  args = parser.parse_args(argv)
  from argenseg_jax.torch_weights.exporting import export_weights
  from argenseg_jax.torch_weights.importing import conversion_mesh
  from argenseg_jax.torch_weights.peft_adapters import export_adapters

  if args.part == "adapters":
    if args.merge:
      parser.error("--merge gives whole weights: leave --part adapters out.")
    count = export_adapters(
      args.source, args.target, mesh=conversion_mesh(args.fsdp)
    )
    print(f"{args.target}: {count} tensors (adapters, PEFT's format).")
    return 0
  count = export_weights(
    args.source,
    args.target,
    mesh=conversion_mesh(args.fsdp),
    part=args.part,
    dtype=args.dtype,
    files_from=args.files_from,
    max_file_bytes=int(args.max_file_gb * 1e9),
    merge=args.merge,
  )
  print(f"{args.target}: {count} tensors ({args.part}).")
  return 0
