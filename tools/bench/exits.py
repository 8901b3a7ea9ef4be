"""`argenseg bench exits`: what masks of fewer scales cost and are worth."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from argenseg_jax.scales import Scales
from argenseg_jax.tools.bench import timing

if TYPE_CHECKING:
  from argenseg_jax.evaluation.segmentation_metrics import SegmentationSums


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg bench exits",
    description="Masks of the first 1, 2, .. scales on a split of the "
    "checkpoint's own data. Batches take turns, so that all rows of the table "
    "meet the same load; CPU seconds are this process's. The last row forces "
    "the words that the model said before: no text is generated.",
    epilog="Example: argenseg bench exits --checkpoint=runs/quickstart/mllm",
  )
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--split", default="val")
  parser.add_argument("--max_samples", type=int, default=256)
  parser.add_argument("--batch_size", type=int, default=1)
  timing.add_profile_option(parser)
  args = parser.parse_args(argv)
  if args.max_samples < 1 or args.batch_size < 1:
    parser.error("--max_samples and --batch_size must be positive")
  import jax
  import numpy as np

  from argenseg_jax.data import examples as rows_lib
  from argenseg_jax.evaluation.records import true_seg_masks
  from argenseg_jax.evaluation.segmentation_metrics import (
    SegmentationSums,
    score,
  )
  from argenseg_jax.tools import warmup

  args.bfloat16 = False
  predictor = warmup.open_predictor(args, batch_size=args.batch_size)
  rows = rows_lib.make_rows(
    predictor.data, predictor.config, predictor.tokenizer
  )
  source = rows_lib.of_split(rows, args.split).source
  scales = predictor.config.vqvae.scales
  exits = [*range(1, len(scales) + 1), None]  # None: forced words.
  sums = {k: SegmentationSums() for k in exits}
  spent = {k: ([], []) for k in exits}
  size, answers, forced, equal = args.batch_size, [], 0, 0
  total = min(args.max_samples, len(source)) // size * size
  for first in range(0, total, size):
    samples = [source[i] for i in range(first, first + size)]
    images = [sample.load_image() for sample in samples]
    texts = [sample.expressions[0] for sample in samples]
    for k in exits:
      options: dict[str, Any] = {"num_scales": k}
      if k is None:
        if size > 1 or not answers[0].has_mask:
          continue  # The words of one row, and a mask after them.
        options = {"answer_prefix": answers[0].text.split("<mask>")[0]}
        forced += 1
      before = answers
      ask = functools.partial(predictor.segment_batch, images, texts, **options)
      answers = _timed(ask, size, spent[k])
      if not first:
        with timing.traces_into(args.profile):
          timing.trace(f"{k or 'forced'} scales", ask)
      if k is None:
        equal += int(np.array_equal(answers[0].codes, before[0].codes))
        continue
      for sample, answer in zip(samples, answers, strict=True):
        truths = true_seg_masks(sample)
        if not truths:
          continue  # A request that words alone answer.
        truth = np.any(truths, axis=0)
        sums[k] += score(answer.seg_mask, truth, has_mask=answer.has_mask)
  print(
    f"{args.split}, {total} examples, batch {size}, "
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n"
  )
  _print_table(scales, spent, sums)
  if forced:
    print(f"\nforced words gave the same codes in {equal} of {forced} answers")
  return 0


def _timed(
  ask: Callable[[], Any], size: int, spent: tuple[list[float], list[float]]
) -> Any:
  """The answers to a batch; adds wall and CPU seconds of each to `spent`."""
  began, cpu = time.perf_counter(), time.process_time()
  answers = ask()
  spent[0].append((time.perf_counter() - began) / size)
  spent[1].append((time.process_time() - cpu) / size)
  return answers


def _print_table(
  scales: tuple[int, ...],
  spent: dict[int | None, tuple[list[float], list[float]]],
  sums: dict[int | None, "SegmentationSums"],
) -> None:
  """A line for each number of scales; None stands for forced words."""
  print("| scales | codes | cIoU | gIoU | ms a mask | CPU ms a mask |")
  print("|---|---:|---:|---:|---:|---:|")
  for k in spent:
    if not spent[k][0]:
      continue
    wall, cpu = (1e3 * statistics.median(times) for times in spent[k])
    name = "all, words forced" if k is None else ",".join(map(str, scales[:k]))
    codes = Scales(scales[:k]).num_codes
    quality = "| |"
    if k is not None:
      found = sums[k].results()
      quality = f"{found['ciou']:.3f} | {found['giou']:.3f} |"
    print(f"| {name} | {codes} | {quality} {wall:.1f} | {cpu:.1f} |")
