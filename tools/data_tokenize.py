"""`argenseg data tokenize`: image codes of a source's masks."""

from argenseg_jax import files
from argenseg_jax.config import ConfigError
from argenseg_jax.tools import data as data_tool


def main(argv: list[str]) -> int:
  parser = data_tool.parser(
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
  out = files.disk_path(args.out)
  if out.exists() and not args.force:
    raise ConfigError(f"{out} exists; give another --out or --force.")
  if not out.parent.is_dir():
    raise ConfigError(f"folder {out.parent} of --out does not exist.")
  from argenseg_jax import mask_codes, rows

  settings, vqvae = data_tool.of_checkpoint(args.checkpoint)
  data = settings.data
  if config_flags:
    data = data_tool.settings(config_flags).data
  source = data_tool.one_source(data, args)
  made = rows.make_rows(source, "mllm", settings.model, settings.tokenizer)
  mask_codes.write(made, vqvae, out)
  print(f"wrote {out}: codes of {len(made.source)} records")
  return 0
