"""`argenseg data check`: reads whole sources and names every fault."""

import dataclasses
import os

from argenseg_jax.data import validate
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.data.text import unescape
from argenseg_jax.evaluation import records, vqa_metrics
from argenseg_jax.runtime.metric_writer import Progress
from argenseg_jax.tools.data import options

FAULTY = 1  # Exit code when a source has a fault.
_WAYS = 6  # Ways to store masks that are listed.


def main(argv: list[str]) -> int:
  parser = options.parser(
    "check",
    "Reads every record with its images and masks, counts them, says how masks "
    "are stored, and names every fault with its file and line; exit code 1 if "
    "there is one.",
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
    for note in findings.notes:
      print(f"  note: {note}")
    for dataset, count in findings.counts.items():
      kinds = ", ".join(f"{n} {k}" for k, n in count.kinds.most_common())
      cut = f", {count.cut} of them cut" if count.cut else ""
      print(
        f"  {dataset}: {count.requests} requests ({kinds}){cut}, "
        f"{len(count.images)} images, {count.masks} masks, "
        f"at most {count.longest} tokens"
      )
      for line in _masks(count):
        print(f"    {line}")
    for fault in findings.faults:
      print(f"  fault: {fault}")
    faulty += bool(findings.faults)
  return FAULTY if faulty else 0


def _masks(count: validate.Counts) -> list[str]:
  """How a data set stores masks, the commonest way first."""
  ways = count.stored.most_common()
  lines = [f"masks: {n} {what}" for what, n in ways[:_WAYS]]
  if len(ways) > _WAYS:
    lines.append(f"masks: {sum(n for _, n in ways[_WAYS:])} in other ways")
  if count.left_out:
    lines.append(
      f"{count.left_out} polygon parts with fewer than three points left out"
    )
  if count.ignores:
    lines.append(f"{count.ignores} masks with pixels that metrics leave out")
  return lines


def _judge(sample: Sample) -> str:
  """What is wrong with the true answer to a question: no rule reads it."""
  if sample.target != "mask" or records.due_masks(sample):
    return ""
  asked = [t["value"] for t in sample.conversation if t["from"] == "human"]
  said = unescape(sample.conversation[-1]["value"])
  answers = sample.answers or (said,)
  # Of several people, the first one's is right as far as they agree with it.
  try:
    _, score = vqa_metrics.score_answer(
      sample.kind, answers[0], answers, question=unescape(asked[-1])
    )
  except ValueError as error:
    return f"{sample.where}: {error}."
  if score or sample.kind == "caption":
    return ""
  return (
    f"{sample.where}: its own answer {answers[0][:60]!r} scores 0 as kind "
    f"{sample.kind!r}."
  )


def _check(settings, data, threads: int, name: str) -> validate.Findings:
  """Small images and masks: their content does not matter here."""
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
    tokenizer=settings.open_tokenizer(),
    image_tokens=settings.model.vision.num_embeddings,
    num_codes=num_codes,
  )
  bar = Progress(f"check {name}", len(source))
  try:
    return validate.check(
      rows, threads=threads, judge=_judge, on_progress=bar.update
    )
  finally:
    bar.close()
