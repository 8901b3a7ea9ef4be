"""`argenseg data tokenize`: image codes of a source's masks."""

import dataclasses

from argenseg_jax.config import ConfigError
from argenseg_jax.runtime import paths
from argenseg_jax.tools.data import options


def main(argv: list[str]) -> int:
  parser = options.parser(
    "tokenize",
    "Writes the image codes of all masks, so that training with "
    "--config.data.codes=FILE runs no image tokenizer. Without --config the "
    "settings are those of the checkpoint's run.",
    "refer=refcoco --checkpoint=runs/mine/vqvae --out=codes.npz",
  )
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--out", required=True, help="file to write, .npz")
  parser.add_argument("--force", action="store_true", help="overwrite --out")
  args, config_flags = parser.parse_known_args(argv)
  out = paths.disk_path(args.out)
  if out.exists() and not args.force:
    raise ConfigError(f"{out} exists; give another --out or --force.")
  if not out.parent.is_dir():
    raise ConfigError(f"folder {out.parent} of --out does not exist.")
  from argenseg_jax.data import examples
  from argenseg_jax.training import code_cache

  settings, vqvae = options.of_checkpoint(args.checkpoint)
  data = settings.data
  if config_flags:
    data = options.settings(config_flags).data
  # Masks alone: no text, whatever the language model.
  source = dataclasses.replace(
    options.one_source(data, args), sequence_length=0, max_images=0
  )
  made = examples.make_rows(source, settings.model, None)
  code_cache.write(made, vqvae, out)
  print(f"wrote {out}: codes of {len(made.source)} records")
  return 0
