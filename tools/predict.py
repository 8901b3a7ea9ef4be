"""`argenseg predict`: segments pictures."""

import argparse
import collections
import glob
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from argenseg_jax.config import ConfigError
from argenseg_jax.data.errors import DataError
from argenseg_jax.runtime.paths import disk_path
from argenseg_jax.tools import warmup

EPILOG = """\
examples:
  argenseg predict --checkpoint=runs/quickstart/mllm --image=photo.jpg \\
    --text="the red circle" --out=mask.png
  argenseg predict --checkpoint=runs/mine/mllm --image photos/ "more/*.jpg" \\
    --text "the cup" "the hand" --out=masks/
  argenseg predict --checkpoint=runs/mine/mllm --requests=- --out=masks/ \\
    --write rle < requests.jsonl

A line of --requests is {"image": FILE, "text": REQUEST}, with "id" (names its
files) and "answer_prefix" where wanted. One picture and one request write
NAME.png, NAME_overlay.png and NAME_strip.png, where --out is NAME.png. Anything
else writes into the folder --out: predictions.jsonl (rle: answers, confidences
and masks as COCO run lengths), pictures of masks, overlays, and strips (the
mask image after each scale).
"""
KINDS = ("mask", "overlay", "strip", "rle")
RECORDS = "predictions.jsonl"
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Job(NamedTuple):
  """One picture, one request."""

  image: pathlib.Path
  text: str
  name: str  # Of its files.
  answer_prefix: str | None


def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  if args.batch_size < 1:
    raise ConfigError(f"--batch-size is {args.batch_size}; give 1 or more.")
  _place(args)
  jobs = _jobs(args)
  out = disk_path(args.out)
  alone = len(jobs) == 1 and not args.requests and not out.is_dir()
  alone = alone and not args.out.endswith("/")
  kinds = args.write or (KINDS[:3] if alone else ("mask", "overlay", "rle"))
  if alone:
    if "rle" in kinds:
      raise ConfigError("--write rle needs a folder: give --out=FOLDER/.")
    jobs = [jobs[0]._replace(name=out.stem)]
    folder, suffix = out.parent, out.suffix or ".png"
    if not folder.is_dir():
      raise ConfigError(f"folder {folder} of --out does not exist.")
  else:
    folder, suffix = out, ".png"
    if folder.exists() and not folder.is_dir():
      raise ConfigError(f"{folder} is a file; give a folder as --out.")
  _refuse_existing(jobs, folder, suffix, kinds, force=args.force)
  if alone:
    _read(jobs[0].image)  # Before the model is.
  predictor = warmup.open_predictor(args, batch_size=args.batch_size)
  folder.mkdir(parents=True, exist_ok=True)
  writer = _Writer(folder, suffix, kinds)
  bad = 0
  from argenseg_jax.runtime.metric_writer import Progress

  bar = Progress("predict", len(jobs), active=not alone)
  try:
    for done, (job, image, answer) in enumerate(
      _answers(predictor, jobs, args), 1
    ):
      bar.update(done)
      if isinstance(answer, DataError):
        if alone:
          raise answer
        bad += 1
        print(f"argenseg predict: {answer}", file=sys.stderr)
        continue
      files = writer(job, image, answer)
      if alone:
        print(f"{_found(answer)}: {answer.text!r}")
        print("wrote " + ", ".join(map(str, files)))
  finally:
    bar.close()
    writer.close()
  if not alone:
    print(f"answered {len(jobs) - bad} requests into {folder}")
  if bad:
    raise DataError(
      f"{bad} of {len(jobs)} requests have no usable picture and were left out."
    )
  return 0


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
    help="pictures, folders of them, or patterns in quotes",
  )
  parser.add_argument(
    "--text", nargs="+", default=[], help="what to segment in each of them"
  )
  parser.add_argument(
    "--point",
    nargs=2,
    type=float,
    metavar=("X", "Y"),
    help="instead of --text, what is there in the picture (pixels)",
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
  parser.add_argument("--write", nargs="+", choices=KINDS, default=None)
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--force", action="store_true", help="overwrite files")
  return parser


def _place(args: argparse.Namespace) -> None:
  """Makes `--point` or `--box` a request in words."""
  if (place := args.point or args.box) is None:
    return
  if len(args.image) != 1 or args.text or args.requests or args.template:
    raise ConfigError("--point and --box need one --image and nothing else.")
  if args.point and args.box:
    raise ConfigError("give --point or --box, not both.")
  height, width = _read(pathlib.Path(args.image[0])).shape[:2]
  shares = [v / (height if i % 2 else width) for i, v in enumerate(place)]
  if not all(0 <= share <= 1 for share in shares):
    raise ConfigError(
      f"{args.image[0]} has {width} x {height} pixels; {place} lies outside."
    )
  from argenseg_jax.data.sources import interactive

  args.text = [interactive.place_text(tuple(shares))]
  args.template = "point" if args.point else "box"


def _jobs(args: argparse.Namespace) -> list[Job]:
  if bool(args.requests) == bool(args.image or args.text):
    raise ConfigError("give --image and --text, or --requests.")
  if args.requests:
    asked = list(_from_jsonl(args.requests))
  elif not args.image or not args.text:
    raise ConfigError("give both --image and --text.")
  else:
    asked = [
      {"image": image, "text": text}
      for given in args.image
      for image in _pictures(given)
      for text in args.text
    ]
  jobs, used = [], collections.Counter()
  for values in asked:
    image = pathlib.Path(values["image"])
    name = stem = values.get("id") or image.stem
    while used[name]:  # The second cup.jpg is cup_2.
      used[stem] += 1
      name = f"{stem}_{used[stem]}"
    used[name] += 1
    prefix = values.get("answer_prefix", args.answer_prefix)
    jobs.append(Job(image, values["text"], name, prefix))
  return jobs


def _pictures(given: str) -> list[str]:
  """A file, the pictures of a folder or those that a pattern matches."""
  path = pathlib.Path(given)
  if path.is_dir():
    found = [p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES]
  elif glob.has_magic(given) and not path.exists():
    found = [p for p in glob.glob(given, recursive=True)]
  else:
    return [given]
  if not found:
    raise DataError(f"--image {given} holds no picture.")
  return sorted(map(str, found))


def _from_jsonl(path: str) -> Iterator[dict[str, Any]]:
  name = "stdin" if path == "-" else path
  try:
    text = sys.stdin.read() if path == "-" else pathlib.Path(path).read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"cannot read --requests {path}: {error}.") from error
  lines = [line for line in text.splitlines() if line.strip()]
  if not lines:
    raise DataError(f"{name} holds no requests.")
  for number, line in enumerate(lines, 1):
    try:
      values = json.loads(line)
      keys = {"image", "text"} | values.keys() & {"id", "answer_prefix"}
      fits = all(isinstance(values[key], str) for key in keys)
    except (ValueError, KeyError, AttributeError):
      fits = False
    if not fits or "/" in values.get("id", ""):
      raise DataError(
        f'{name}, request {number}: write {{"image": FILE, "text": REQUEST}}, '
        'with "id" and "answer_prefix" as plain text where wanted.'
      )
    yield values


def _file(folder, name, suffix, kind) -> pathlib.Path:
  part = "" if kind == "mask" else f"_{kind}"
  return folder / f"{name}{part}{suffix}"


def _refuse_existing(jobs, folder, suffix, kinds, *, force: bool) -> None:
  files = [
    _file(folder, job.name, suffix, kind)
    for job in jobs
    for kind in kinds
    if kind != "rle"
  ]
  if "rle" in kinds:
    files.append(folder / RECORDS)
  for file in files:
    if file.exists() and not force:
      raise ConfigError(f"{file} exists; give another --out or --force.")


def _read(path: pathlib.Path):
  from argenseg_jax.data import transforms

  return transforms.decode_image(path)


def _answers(predictor, jobs: Sequence[Job], args) -> Iterator[tuple]:
  """Yields jobs, pictures and answers, or what is wrong with the picture.

  Requests of one picture share what the model saw of it.
  """
  for group in _groups(jobs, args.batch_size):
    read = {}
    for image in {job.image for job in group}:
      try:
        read[image] = _read(image)
      except DataError as error:
        read[image] = error
    good = [j for j in group if not isinstance(read[j.image], DataError)]
    options = {"num_scales": args.num_scales, "template": args.template}
    if good:
      options["answer_prefix"] = good[0].answer_prefix
    texts = [job.text for job in good]
    if len(read) == 1 and len(good) > 1:
      picture = predictor.set_image(read[good[0].image])
      found = picture.segment_batch(texts, **options)
    else:
      images = [read[job.image] for job in good]
      found = predictor.segment_batch(images, texts, **options)
    answers = dict(zip(map(id, good), found, strict=True))
    for job in group:
      image = read[job.image]
      yield job, image, answers.get(id(job), image)


def _groups(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
  """Neighbours that can be asked together: several requests of a picture, or
  pictures with a request each, with the same forced words."""
  group: list[Job] = []
  for job in jobs:
    if group:
      images = {j.image for j in group}
      fits = job.answer_prefix == group[0].answer_prefix and len(group) < size
      same = job.image in images
      # Either all of one picture, or no two of one.
      fits = fits and (len(group) == 1 or same == (len(images) == 1))
      if not fits:
        yield group
        group = []
    group.append(job)
  if group:
    yield group


class _Writer:
  """Writes answers as they come."""

  def __init__(self, folder: pathlib.Path, suffix: str, kinds: Sequence[str]):
    self._folder, self._suffix, self._kinds = folder, suffix, kinds
    self._records = None
    if "rle" in kinds:
      self._records = (folder / RECORDS).open("w")

  def __call__(self, job: Job, image, answer) -> list[pathlib.Path]:
    from PIL import Image

    from argenseg_jax.data.masks import run_lengths
    from argenseg_jax.visualize import render

    draw = {
      "mask": lambda: answer.seg_mask,
      "overlay": lambda: render.overlay(image, answer.seg_mask),
      "strip": lambda: render.join_strip(answer.strip, 128),
    }
    files = []
    for kind in KINDS[:3]:
      if kind in self._kinds:
        file = _file(self._folder, job.name, self._suffix, kind)
        Image.fromarray(draw[kind]()).save(file)
        files.append(file)
    if self._records is not None:
      record = {
        "id": job.name,
        "image": str(job.image),
        "request": job.text,
        "answer": answer.text,
        "confidence": answer.confidence if answer.has_mask else None,
        "masks": [run_lengths(mask) for mask in answer.seg_masks],
      }
      self._records.write(json.dumps(record) + "\n")
      self._records.flush()
    return files

  def close(self) -> None:
    if self._records is not None:
      self._records.close()


def _found(answer) -> str:
  if not answer.has_mask:
    return "no mask"
  share = answer.seg_mask.mean()
  return (
    f"a mask of {share:.1%} of the picture (confidence {answer.confidence:.2f})"
  )
