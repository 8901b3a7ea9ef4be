"""`argenseg data show`: a contact sheet of records as a model gets them."""

import itertools
from typing import Any

import numpy as np

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import paths
from argenseg_jax.tools.data import options


def main(argv: list[str]) -> int:
  parser = options.parser(
    "show",
    "Writes a PNG: image, request, mask and token layout of some records, "
    "and with --checkpoint what its image tokenizer makes of the masks "
    "(settings are then those of its run).",
    "refer=refcoco --checkpoint=runs/mine/mllm --out=sheet.png",
  )
  parser.add_argument("--checkpoint", default="")
  parser.add_argument("--first", type=int, default=0, help="first record")
  parser.add_argument("--count", type=int, default=8, help="how many")
  parser.add_argument(
    "--odd",
    action="store_true",
    help="only records with a fault, or with a mask that is not stored in two "
    "plain values: soft, colored, indexed, alpha",
  )
  parser.add_argument("--out", default="sheet.png", help="PNG to write")
  parser.add_argument("--force", action="store_true", help="overwrite --out")
  args, config_flags = parser.parse_known_args(argv)
  out = paths.disk_path(args.out)
  if out.exists() and not args.force:
    raise ConfigError(f"{out} exists; give another --out or --force.")
  if not out.parent.is_dir():
    raise ConfigError(f"folder {out.parent} of --out does not exist.")
  if args.checkpoint and config_flags:
    raise ConfigError(
      f"--checkpoint brings its own settings; leave {config_flags[0]} out."
    )
  from argenseg_jax.data import examples
  from argenseg_jax.visualize import contact_sheet

  reconstruct = None
  if args.checkpoint:
    settings, vqvae = options.of_checkpoint(args.checkpoint)
    reconstruct = _round_trip(vqvae)
  else:
    settings = options.settings(config_flags)
  source = options.one_source(settings.data, args)
  made = examples.make_rows(source, settings.model, settings.open_tokenizer())
  total = len(made.source)
  indices = range(args.first, min(args.first + args.count, total))
  if args.odd and args.first >= 0:
    places = range(args.first, total)
    odd = (i for i in places if _is_odd(made, i))
    indices = list(itertools.islice(odd, max(args.count, 0)))
    if not indices:
      print(f"no record of {source.path} from {args.first} on is odd")
      return 0
  if not indices or args.first < 0:
    raise ConfigError(
      f"--first={args.first} --count={args.count} names none of the {total} "
      f"records of {source.path}."
    )
  contact_sheet.draw(made, indices, out, reconstruct=reconstruct)
  print(f"wrote {out}")
  return 0


def _is_odd(made, index: int) -> bool:
  from argenseg_jax.visualize import contact_sheet

  return bool(made(index).error or contact_sheet.odd_masks(made, index))


def _round_trip(vqvae):
  from flax import nnx

  from argenseg_jax import sharding
  from argenseg_jax.inference.segment import to_uint8
  from argenseg_jax.models.argenseg import normalize_seg_masks

  state = nnx.state(vqvae)

  def reconstruct(seg_masks: np.ndarray) -> np.ndarray:
    pixels: Any = sharding.put_like(seg_masks, state)
    decoded = vqvae.decode(vqvae.encode(normalize_seg_masks(pixels)))
    return np.asarray(to_uint8(decoded))

  return reconstruct
