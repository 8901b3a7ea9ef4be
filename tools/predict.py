"""`argenseg predict`: segments one picture."""

import argparse
import pathlib


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg predict",
    description="Writes the mask of a request, beside it an overlay on the "
    "picture (NAME_overlay.png) and the mask image after each scale "
    "(NAME_strip.png).",
    epilog="Example: argenseg predict --checkpoint=runs/quickstart/mllm "
    '--image=photo.jpg --text="the red circle" --out=mask.png',
  )
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--image", required=True, help="any common format")
  parser.add_argument("--text", required=True, help="what to segment")
  parser.add_argument("--out", default="mask.png")
  parser.add_argument(
    "--weights",
    default="",
    choices=("", "int8", "float8_e4m3fn"),
    help="round the decoder's weights to eight bits first",
  )
  parser.add_argument("--force", action="store_true", help="overwrite files")
  args = parser.parse_args(argv)
  from PIL import Image

  from argenseg_jax import report
  from argenseg_jax.config import ConfigError
  from argenseg_jax.data import transforms
  from argenseg_jax.predict import Predictor

  out = pathlib.Path(args.out)
  files = [
    out.with_name(f"{out.stem}{part}{out.suffix or '.png'}")
    for part in ("", "_overlay", "_strip")
  ]
  for file in files:
    if file.exists() and not args.force:
      raise ConfigError(f"{file} exists; give another --out or --force.")
  if not out.parent.is_dir():
    raise ConfigError(f"folder {out.parent} of --out does not exist.")
  image = transforms.decode_image(pathlib.Path(args.image))
  predictor = Predictor.from_checkpoint(
    args.checkpoint, weights=args.weights or None
  )
  prediction = predictor.segment(image, args.text)
  pictures = (
    prediction.seg_mask,
    report.overlay(image, prediction.seg_mask),
    report.join_strip(prediction.strip, 128),
  )
  for file, picture in zip(files, pictures, strict=True):
    Image.fromarray(picture).save(file)
  share = prediction.seg_mask.mean()
  found = f"a mask of {share:.1%} of the picture"
  print(f"{found if prediction.has_mask else 'no mask'}: {prediction.text!r}")
  print("wrote " + ", ".join(map(str, files)))
  return 0
