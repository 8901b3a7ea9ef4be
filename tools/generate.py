"""`argenseg generate`: draws images for texts."""

import argparse
import math


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg generate",
    description="Writes an image for each text (NAME_0.png, NAME_1.png, ...) "
    "and beside it the image after each scale (NAME_0_strip.png). The model "
    "must have been trained on images (layout text_to_image).",
    epilog="Example: argenseg generate --checkpoint=runs/images/mllm "
    '--text "a red circle" "two boats" --guidance=4 --out=drawn.png',
  )
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--text", required=True, nargs="+", help="what to draw")
  parser.add_argument(
    "--guidance",
    type=float,
    default=4.0,
    help="at the last scale, less before; 0: none (default: the paper's 4)",
  )
  parser.add_argument("--out", default="drawn.png", metavar="NAME.png")
  parser.add_argument("--force", action="store_true", help="overwrite files")
  args = parser.parse_args(argv)
  from PIL import Image

  from argenseg_jax import checkpoint
  from argenseg_jax.config import ConfigError
  from argenseg_jax.inference import requests
  from argenseg_jax.inference.text_to_image import draw_images
  from argenseg_jax.runtime.paths import disk_path
  from argenseg_jax.visualize import render

  if not 0 <= args.guidance < math.inf:
    raise ConfigError(f"--guidance is {args.guidance}; use 0 or more.")
  out = disk_path(args.out)
  if not out.parent.is_dir():
    raise ConfigError(f"folder {out.parent} of --out does not exist.")
  if out.suffix not in ("", ".png"):
    raise ConfigError(f"--out ends with {out.suffix}; images are .png files.")
  files = [
    out.with_name(f"{out.stem}_{i}{part}.png")
    for i in range(len(args.text))
    for part in ("", "_strip")
  ]
  requests.require_writable(files, [], force=args.force)
  images, stages = draw_images(
    checkpoint.load(args.checkpoint), args.text, guidance=args.guidance
  )
  strips = [render.join_strip(stage, 128) for stage in stages]
  drawn = [part for pair in zip(images, strips, strict=True) for part in pair]
  for file, pixels in zip(files, drawn, strict=True):
    Image.fromarray(pixels).save(file)
  print("wrote " + ", ".join(map(str, files)))
  return 0
