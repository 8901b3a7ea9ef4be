"""`argenseg bench data`: how fast batches are made, and who waits for them."""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

EXAMPLE = """\
examples:
  argenseg bench data               all of it, in about a minute
  argenseg bench data --steps=0     without training

Images are 448 x 448 JPEGs of quality 90 with a PNG mask each; rows are those
of configs/base.py (680 codes of a 256 px mask), with 2,048 tokens. One thread
makes batches of 32; "a core" counts the seconds that this process had a core,
"wall" all that passed. Both are the best of several batches. The training is
the decoder of configs/tiny.py on ref_shapes, with codes, as in the quickstart;
its share is what the loop spent in asking for the next batch.
"""

_BATCH = 32


class Rate(NamedTuple):
  """Samples a second."""

  name: str
  core: float
  wall: float


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg bench data",
    description="How fast batches are made, and how long training waits.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--records", type=int, default=2048)
  parser.add_argument("--batches", type=int, default=12, help="of each kind")
  parser.add_argument(
    "--steps", type=int, default=60, help="of training; 0 leaves it out"
  )
  args = parser.parse_args(argv)
  if args.records < 1 or args.batches < 1 or args.steps < 0:
    parser.error("--records and --batches must be positive, --steps too or 0")
  with tempfile.TemporaryDirectory() as folder:
    print("| from | samples/s a core | samples/s wall |")
    print("|---|---:|---:|")
    for rate in rates(pathlib.Path(folder), args.records, args.batches):
      print(f"| {rate.name} | {rate.core:.0f} | {rate.wall:.0f} |", flush=True)
    if args.steps:
      seconds, share = waiting(pathlib.Path(folder), args.steps)
      print(
        f"\ntraining step {seconds:.3f} s, of which at most {share:.2%} waits "
        "for data"
      )
  return 0


def rates(folder: pathlib.Path, records: int, batches: int) -> Iterator[Rate]:
  """Yields what each way to store data gives; files go to `folder`."""
  import numpy as np

  from argenseg_jax.config import DataConfig
  from argenseg_jax.data import array_record_writer, text
  from argenseg_jax.data.example_builder import RowMaker
  from argenseg_jax.data.sources.array_record import Resizing
  from argenseg_jax.data.sources.registry import open_source

  config = DataConfig(
    path=str(_write_pictures(folder, records)),
    source="jsonl",
    sequence_length=2048,
    mask_channels=1,
    resize="opencv",
    threads=0,
    prefetch=0,
  )
  tokenizer, num_codes = text.TextTokenizer(), 680
  codes = np.zeros((records, 1, num_codes), np.int32)

  def rate(name: str, *, coded: bool = False, **changes) -> Rate:
    changed = dataclasses.replace(config, **changes)
    rows = RowMaker(
      open_source(changed),
      changed,
      tokenizer=tokenizer,
      image_tokens=256,
      num_codes=num_codes,
      codes=codes if coded else None,
    )
    return Rate(name, *_measure(rows, batches))

  yield rate("448 px JPEG, Pillow's resize", resize="pillow")
  yield rate("448 px JPEG, OpenCV's resize")
  sources = {"train": open_source(config)}
  for name, resizing in (
    ("the same JPEG packed, with codes", None),
    ("packed with --resize_pictures, with codes", Resizing.of(config)),
  ):
    out = folder / f"packed{resizing is not None}"
    array_record_writer.build(sources, out, resizing=resizing)
    yield rate(name, coded=True, source="array_record", path=str(out))


def _measure(rows, batches: int) -> tuple[float, float]:
  """Samples a second of a core and of the clock."""
  from argenseg_jax.data.pipeline import TrainIterator

  iterator = TrainIterator(rows, _BATCH)
  next(iterator)  # Opens files.
  core, wall = [], []
  for _ in range(batches):
    began, worked = time.perf_counter(), time.process_time()
    next(iterator)
    core.append(time.process_time() - worked)
    wall.append(time.perf_counter() - began)
  iterator.close()
  return _BATCH / min(core), _BATCH / min(wall)


def _write_pictures(folder: pathlib.Path, count: int) -> pathlib.Path:
  """Images with some detail, and an ellipse as the mask of each."""
  import cv2
  import numpy as np

  rng, side = np.random.default_rng(0), 448
  lines = []
  for i in range(count):
    rough = rng.integers(0, 255, (56, 56, 3), np.uint8)
    smooth = cv2.resize(rough, (side, side), interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(0, 16, smooth.shape, np.uint8)
    quality = (cv2.IMWRITE_JPEG_QUALITY, 90)
    cv2.imwrite(str(folder / f"{i}.jpg"), cv2.subtract(smooth, noise), quality)
    seg_mask = np.zeros((side, side), np.uint8)
    center, axes = rng.integers(100, 348, 2), rng.integers(20, 100, 2)
    cv2.ellipse(
      seg_mask,
      tuple(map(int, center)),
      tuple(map(int, axes)),
      i,
      0,
      360,
      255,
      -1,
    )
    cv2.imwrite(str(folder / f"{i}.png"), seg_mask)
    asked = f"<image>\nthe thing number {i} on the left of the table"
    answer = "Sure, the segmentation result: <mask>."
    record = {
      "image": f"{i}.jpg",
      "mask": f"{i}.png",
      "conversations": [
        {"from": "human", "value": asked},
        {"from": "gpt", "value": answer},
      ],
    }
    lines.append(json.dumps(record))
  path = folder / "data.jsonl"
  path.write_text("\n".join(lines))
  return path


def waiting(folder: pathlib.Path, steps: int) -> tuple[float, float]:
  """Seconds of a training step on the quickstart's config, and the share of
  them that waits for data.

  The first interval of the log, which holds the compilation, is left out.
  """
  from argenseg_jax import config_parsing
  from argenseg_jax.configs import tiny
  from argenseg_jax.data.ref_shapes import builder
  from argenseg_jax.training import loop

  data = builder.prepare(folder / "shapes", num_train=600, num_eval=16)
  values = tiny.get_config()
  values.data.path = str(data)
  values.mllm.train.steps = steps
  values.mllm.train.log_every = max(steps // 6, 1)
  workdir = folder / "run"
  loop.train(config_parsing.run_config(values), "mllm", workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [r for r in map(json.loads, lines) if "seconds/data" in r]
  first, last = found[0], found[-1]
  spent = {k: last[k] - first[k] for k in last if k.startswith("seconds/")}
  seconds = sum(spent.values())
  return seconds / (last["step"] - first["step"]), spent[
    "seconds/data"
  ] / seconds
