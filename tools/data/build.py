"""`argenseg data build`: packs a source into ArrayRecord files."""

import dataclasses
import os

from argenseg_jax.data import array_record_writer
from argenseg_jax.data.sources.array_record import Resizing
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.runtime.metric_writer import Progress
from argenseg_jax.tools.data import options


def main(argv: list[str]) -> int:
  parser = options.parser(
    "build",
    "Packs the records of a source, images and masks included, into "
    "ArrayRecord files of a TFDS data set, to be read as array_record=DIR. "
    "The same command resumes an interrupted build.",
    "refer=refcoco --split=train,val --out=packed/refcoco",
  )
  parser.add_argument("--out", required=True, help="folder to write")
  parser.add_argument("--records_per_shard", type=int, default=1_000)
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument(
    "--max_bad_share",
    type=float,
    default=0.1,
    help="more bad records stop the build; fewer are left out and named",
  )
  parser.add_argument(
    "--resize_pictures",
    action="store_true",
    help="store the pixels that data.image_side, data.resize and "
    "data.pad_square of the config make of each image, three bytes a pixel: "
    "training decodes nothing. For training, not for evaluation",
  )
  parser.add_argument(
    "--beam",
    default=None,
    metavar="OPTIONS",
    help="write shards on many machines with Apache Beam, which needs the "
    'extra [beam]; options of the pipeline, such as "--runner=DirectRunner"',
  )
  args, config_flags = parser.parse_known_args(argv)
  settings = options.settings(config_flags)
  data = options.one_source(settings.data, args)
  sources = {
    split: open_source(dataclasses.replace(data, split=split))
    for split in data.split.split(",")
  }
  bar = Progress(f"build {args.out}", sum(map(len, sources.values())))
  try:
    built = array_record_writer.build(
      sources,
      args.out,
      records_per_shard=max(args.records_per_shard, 1),
      workers=args.workers,
      max_bad_share=args.max_bad_share,
      resizing=Resizing.of(data) if args.resize_pictures else None,
      beam=args.beam,
      on_progress=bar.update,
    )
  finally:
    bar.close()
  for split, what in built.items():
    print(f"{args.out} {split}: {what.records} records")
    for fault in what.faults:
      print(f"  left out: {fault}")
  return 0
