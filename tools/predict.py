"""`argenseg predict`: segments images."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from argenseg_jax.config import ConfigError
from argenseg_jax.data.errors import DataError
from argenseg_jax.inference import requests
from argenseg_jax.inference.requests import Job
from argenseg_jax.runtime.paths import disk_path
from argenseg_jax.tools import warmup

if TYPE_CHECKING:
  from argenseg_jax.runtime.profile import StepTrace

_TRACED = 10  # Batches in a trace.
EPILOG = """\
examples:
  argenseg predict --checkpoint=runs/quickstart/mllm --image=photo.jpg \\
    --text="the red circle" --out=mask.png
  argenseg predict --checkpoint=runs/mine/mllm --image photos/ "more/*.jpg" \\
    --text "the cup" "the hand" --out=masks/
  argenseg predict --checkpoint=runs/mine/mllm --requests=- --out=masks/ \\
    --write rle < requests.jsonl

A line of --requests is {"image": FILE, "text": REQUEST}, with "id" (names its
files) and "answer_prefix" where wanted. One image and one request write
NAME.png, NAME_overlay.png and NAME_strip.png, where --out is NAME.png. Anything
else writes into the folder --out: predictions.jsonl (rle: answers, confidences
and masks as COCO run lengths), masks, overlays, and strips (the mask image
after each scale). Inputs are never overwritten.
"""


class _Plan(NamedTuple):
  """What will be answered, and where the answers go.

  Attributes:
    jobs: in order; some have a fault.
    folder: of all files.
    suffix: of images.
    kinds: of `requests.KINDS`.
    alone: one image and one request, which name their own files.
  """

  jobs: list[Job]
  folder: pathlib.Path
  suffix: str
  kinds: tuple[str, ...]
  alone: bool


def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  images = _Images()
  plan = _checked(args, images)
  from argenseg_jax.inference.answer_files import AnswerFiles
  from argenseg_jax.runtime.metric_writer import Progress

  trace = _step_trace(args.profile)
  predictor = warmup.open_predictor(args, batch_size=args.batch_size)
  plan.folder.mkdir(parents=True, exist_ok=True)
  bad, first = 0, ""
  with AnswerFiles(
    plan.folder, plan.suffix, plan.kinds, force=args.force
  ) as write:
    bar = Progress("predict", len(plan.jobs), active=not plan.alone)
    answers = _answers(predictor, plan.jobs, images, args, trace)
    try:
      for done, (job, image, answer) in enumerate(answers, 1):
        bar.update(done)
        if isinstance(answer, DataError):
          if plan.alone:
            raise answer
          bad, first = bad + 1, first or str(answer)
          print(f"argenseg predict: {answer}", file=sys.stderr)
          continue
        files = write(job, image, answer)
        if plan.alone:
          print(f"{_found(answer)}: {answer.text!r}")
          print("wrote " + ", ".join(map(str, files)))
    finally:
      bar.close()
      trace.close()
  if not plan.alone:
    print(f"answered {len(plan.jobs) - bad} requests into {plan.folder}")
  if bad:
    raise DataError(
      f"{bad} of {len(plan.jobs)} requests could not be answered and were left "
      f"out; the first: {first}"
    )
  return 0


def _checked(args: argparse.Namespace, images: "_Images") -> _Plan:
  """Everything that can be decided without a model.

  Raises:
    ConfigError, DataError: nothing can be answered, or an answer would
      overwrite a file.
  """
  from argenseg_jax.data import chat

  if args.batch_size < 1:
    raise ConfigError(f"--batch_size is {args.batch_size}; give 1 or more.")
  if args.num_scales is not None and args.num_scales < 1:
    raise ConfigError(f"--num_scales is {args.num_scales}; give 1 or more.")
  if args.template and args.template not in chat.REQUEST_TEMPLATES:
    raise ConfigError(
      f"--template is {args.template!r}; use one of "
      f"{', '.join(chat.REQUEST_TEMPLATES)}."
    )
  _place(args, images)
  jobs = _jobs(args)
  out = disk_path(args.out)
  alone = len(jobs) == 1 and not args.requests and not out.is_dir()
  alone = alone and not args.out.endswith("/")
  kinds = args.write or (
    requests.IMAGES if alone else ("mask", "overlay", "rle")
  )
  if alone:
    if "rle" in kinds:
      raise ConfigError("--write rle needs a folder: give --out=FOLDER/.")
    if not out.parent.is_dir():
      raise ConfigError(f"folder {out.parent} of --out does not exist.")
    folder, suffix = out.parent, out.suffix or ".png"
    if suffix.lower() not in requests.LOSSLESS:
      raise ConfigError(
        f"--out ends with {suffix}, which cannot store a mask without loss; "
        f"use one of {', '.join(requests.LOSSLESS)}."
      )
    jobs = [dataclasses.replace(jobs[0], id=out.stem)]
  else:
    folder, suffix = out, ".png"
    if folder.exists() and not folder.is_dir():
      raise ConfigError(f"{folder} is a file; give a folder as --out.")
  jobs = requests.named(jobs, kinds, suffix)
  good = [job for job in jobs if not job.fault]
  if not good:
    raise DataError(jobs[0].fault)
  inputs = [job.image for job in jobs]
  if args.requests and args.requests != "-":
    inputs.append(pathlib.Path(args.requests))
  requests.require_writable(
    requests.outputs(good, folder, suffix, kinds), inputs, force=args.force
  )
  if alone:
    images.read([good[0].image])
    if isinstance(found := images[good[0].image], DataError):
      raise found
  return _Plan(jobs, folder, suffix, tuple(kinds), alone)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="argenseg predict",
    description="Writes the masks of requests.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  warmup.add_model_options(parser)
  parser.add_argument(
    "--image",
    nargs="+",
    default=[],
    metavar="FILE",
    help="images, folders of them, or patterns in quotes",
  )
  parser.add_argument(
    "--text", nargs="+", default=[], help="what to segment in each of them"
  )
  parser.add_argument(
    "--point",
    nargs=2,
    type=float,
    metavar=("X", "Y"),
    help="instead of --text, what is there in the image (pixels)",
  )
  parser.add_argument(
    "--box",
    nargs=4,
    type=float,
    metavar=("X1", "Y1", "X2", "Y2"),
    help="instead of --text, what is in there (pixels)",
  )
  parser.add_argument(
    "--template",
    default="",
    help="kind of request (docs/evaluation.md); that of the model's training "
    "if not given",
  )
  parser.add_argument(
    "--requests", metavar="FILE", help="jsonl instead; - reads it from stdin"
  )
  parser.add_argument("--out", default="mask.png")
  parser.add_argument(
    "--write", nargs="+", choices=requests.KINDS, default=None
  )
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--force", action="store_true", help="overwrite files")
  parser.add_argument(
    "--profile",
    metavar="DIR",
    help=f"write a trace of the first {_TRACED} batches for XProf "
    "(docs/pods.md); the first one compiles, unless `argenseg warmup` did",
  )
  return parser


def _step_trace(folder: str | None) -> "StepTrace":
  """Traces the first batches into `--profile`, if that is given."""
  from argenseg_jax.runtime.profile import StepTrace

  if not folder:
    return StepTrace(pathlib.Path(), (), name="predict")
  path = disk_path(folder)
  path.mkdir(parents=True, exist_ok=True)
  return StepTrace(path, (1, _TRACED), name="predict")


def _place(args: argparse.Namespace, images: "_Images") -> None:
  """Makes `--point` or `--box` a request in words."""
  if (place := args.point or args.box) is None:
    return
  if len(args.image) != 1 or args.text or args.requests or args.template:
    raise ConfigError("--point and --box need one --image and nothing else.")
  if args.point and args.box:
    raise ConfigError("give --point or --box, not both.")
  path = pathlib.Path(args.image[0])
  images.read([path])
  if isinstance(image := images[path], DataError):
    raise image
  height, width = image.shape[:2]
  shares = [v / (height if i % 2 else width) for i, v in enumerate(place)]
  if not all(0 <= share <= 1 for share in shares):
    raise ConfigError(
      f"{path} has {width} x {height} pixels; {place} lies outside."
    )
  from argenseg_jax.data.sources import interactive

  args.text = [interactive.place_text(tuple(shares))]
  args.template = "point" if args.point else "box"


def _jobs(args: argparse.Namespace) -> list[Job]:
  if bool(args.requests) == bool(args.image or args.text):
    raise ConfigError("give --image and --text, or --requests.")
  if args.requests:
    return requests.from_jsonl(args.requests, args.answer_prefix)
  if not args.image or not args.text:
    raise ConfigError("give both --image and --text.")
  return requests.from_options(args.image, args.text, args.answer_prefix)


class _Images:
  """Decoded images, or what is wrong with them; each is decoded once while
  requests about it follow one another."""

  def __init__(self) -> None:
    self._read: dict[pathlib.Path, np.ndarray | DataError] = {}
    self._seen: tuple[pathlib.Path, Any] | None = None

  def __getitem__(self, path: pathlib.Path) -> np.ndarray | DataError:
    return self._read[path]

  def read(self, paths: Sequence[pathlib.Path]) -> None:
    """Reads what was not asked for last, and forgets all others."""
    from argenseg_jax.data import image_codec

    kept, self._read = self._read, {}
    for path in dict.fromkeys(paths):
      if path in kept:
        self._read[path] = kept[path]
        continue
      try:
        self._read[path] = image_codec.decode_image(path)
      except DataError as error:
        self._read[path] = error

  def seen(self, path: pathlib.Path, predictor) -> Any:
    """The image as the model has seen it, once."""
    if self._seen is None or self._seen[0] != path:
      self._seen = (path, predictor.set_image(self._read[path]))
    return self._seen[1]


def _answers(
  predictor,
  jobs: Sequence[Job],
  images: _Images,
  args: argparse.Namespace,
  trace: "StepTrace",
) -> Iterator[tuple[Job, Any, Any]]:
  """Yields jobs, images and answers, or what is wrong with the request.

  Requests of one image share what the model saw of it. A batch is a step of
  `trace`.
  """
  for job in jobs:
    if job.fault:
      yield job, None, DataError(job.fault)
  asked = [job for job in jobs if not job.fault]
  for step, group in enumerate(_groups(asked, args.batch_size), 1):
    with trace.step(step):
      images.read([job.image for job in group])
      good = [j for j in group if not isinstance(images[j.image], DataError)]
      found = _ask(predictor, good, images, args) if good else []
    if trace.ends_with(step):
      trace.write()
    answers = dict(zip(map(id, good), found, strict=True))
    for job in group:
      image = images[job.image]
      yield job, image, answers.get(id(job), image)


def _ask(predictor, group: Sequence[Job], images: _Images, args) -> list[Any]:
  """Answers, or what is wrong with a request, of jobs with readable images."""
  options = {
    "answer_prefix": group[0].answer_prefix,
    "num_scales": args.num_scales,
    "template": args.template,
  }
  texts = [job.text for job in group]
  paths = {job.image for job in group}
  try:
    if len(paths) == 1 and len(group) > 1:
      seen = images.seen(group[0].image, predictor)
      return seen.segment_batch(texts, **options)
    shown = [images[job.image] for job in group]
    return predictor.segment_batch(shown, texts, **options)
  except DataError as error:
    if len(group) == 1:
      job = group[0]
      where = job.where or f"{job.image}, {job.text[:40]!r}"
      return [DataError(f"{where}: {error}")]
  # One of them is at fault: the others are answered one by one.
  return [_ask(predictor, [job], images, args)[0] for job in group]


def _groups(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
  """Neighbors that can be asked together: several requests of an image, or
  images with a request each, with the same forced words."""
  group: list[Job] = []
  for job in jobs:
    if group:
      images = {j.image for j in group}
      fits = job.answer_prefix == group[0].answer_prefix and len(group) < size
      same = job.image in images
      # Either all of one image, or no two of one.
      fits = fits and (len(group) == 1 or same == (len(images) == 1))
      if not fits:
        yield group
        group = []
    group.append(job)
  if group:
    yield group


def _found(answer) -> str:
  if not answer.has_mask:
    return "no mask"
  share = answer.seg_mask.mean()
  return (
    f"a mask of {share:.1%} of the image (confidence {answer.confidence:.2f})"
  )
