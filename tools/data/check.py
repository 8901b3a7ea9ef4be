"""`argenseg data check`: reads whole sources and names every fault."""

import dataclasses
import os

from argenseg_jax.data import validate
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.runtime.metric_writer import Progress
from argenseg_jax.tools.data import options

FAULTY = 1  # Exit code when a source has a fault.


def main(argv: list[str]) -> int:
  parser = options.parser(
    "check",
    "Reads every record with its pictures and masks, counts them, and names "
    "every fault with its file and line; exit code 1 if there is one.",
    "refer=refcoco grefer=grefcoco --split=val",
  )
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  args, config_flags = parser.parse_known_args(argv)
  settings = options.settings(config_flags)
  faulty = 0
  for data in options.with_sources(settings.data, args):
    name = f"{data.source}={data.path} split {data.split}"
    try:
      findings = _check(settings, data, max(args.threads, 1), name)
    except DataError as error:  # It cannot be opened; others may.
      findings = validate.Findings({}, [str(error)])
    print(f"{name}: {len(findings.faults)} faults")
    for dataset, count in findings.counts.items():
      kinds = ", ".join(f"{n} {k}" for k, n in count.kinds.most_common())
      cut = f", {count.cut} of them cut" if count.cut else ""
      print(
        f"  {dataset}: {count.requests} requests ({kinds}){cut}, "
        f"{len(count.pictures)} pictures, {count.masks} masks, "
        f"at most {count.longest} tokens"
      )
    for fault in findings.faults:
      print(f"  fault: {fault}")
    faulty += bool(findings.faults)
  return FAULTY if faulty else 0


def _check(settings, data, threads: int, name: str) -> validate.Findings:
  """Small pictures and masks: their content does not matter here."""
  source = open_source(data, evaluation=True)
  num_codes = settings.model.vqvae.codes_per_mask
  small = dataclasses.replace(
    data,
    image_side=8,
    mask_side=8,
    mask_intermediate_side=None,
    resize="opencv",
    cache=False,
  )
  rows = RowMaker(
    source,
    small,
    tokenizer=settings.tokenizer,
    image_tokens=settings.model.vision.num_embeddings,
    num_codes=num_codes,
  )
  bar = Progress(f"check {name}", len(source))
  try:
    return validate.check(rows, threads=threads, on_progress=bar.update)
  finally:
    bar.close()
