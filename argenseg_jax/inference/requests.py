"""What `argenseg predict` is asked, and the files that answer it.

Everything is decided before a model is loaded: which requests can be answered,
and under which names, so that no answer overwrites another one or an input.
"""

import dataclasses
import difflib
import glob
import json
import os
import pathlib
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from argenseg_jax.config import ConfigError
from argenseg_jax.data import input_files
from argenseg_jax.data.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Formats that keep every pixel of a mask as it is.
LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".webp")
IMAGES = ("mask", "overlay", "strip")  # Kinds of files, one a request.
RECORDS = "predictions.jsonl"  # Of kind "rle", one for all requests.
KINDS = (*IMAGES, "rle")

_MAX_NAME = 255  # Bytes of a file's name, on every usual disk.
_MAX_REQUESTS_BYTES = 1 << 30
_KEYS = {"image", "text", "id", "answer_prefix"}


@dataclasses.dataclass(frozen=True)
class Job:
  """One image, one request.

  Attributes:
    image: its file.
    text: the request.
    id: what the user calls it; empty where nothing was given.
    answer_prefix: forced words, or None.
    name: stem of its files.
    where: file and line, for messages; empty where there is none.
    fault: why it cannot be answered; empty where it can.
  """

  image: pathlib.Path
  text: str
  id: str = ""
  answer_prefix: str | None = None
  name: str = ""
  where: str = ""
  fault: str = ""


def from_options(
  images: Sequence[str], texts: Sequence[str], answer_prefix: str | None
) -> list[Job]:
  """Every text about every image of files, folders and patterns.

  Raises:
    DataError: a folder or pattern without an image.
  """
  return [
    Job(pathlib.Path(image), text, answer_prefix=answer_prefix)
    for given in images
    for image in _images(given)
    for text in texts
  ]


def from_jsonl(path: str, answer_prefix: str | None) -> list[Job]:
  """The requests of a jsonl file, or of stdin for "-".

  A line that is no request becomes a job with a fault.

  Args:
    path: of the file.
    answer_prefix: of requests that name none.

  Raises:
    DataError: the file cannot be read or holds no request.
  """
  name = "stdin" if path == "-" else path
  try:
    text = _read_text(path)
  except DataError as error:
    raise DataError(f"--requests {path}: {error}") from error
  # Only "\n" ends a line: a text may hold U+2028 and its like.
  lines = [line for line in text.split("\n") if line.strip()]
  if not lines:
    raise DataError(f"{name} contains no requests.")
  return [
    _from_line(line, f"{name}, request {number}", answer_prefix)
    for number, line in enumerate(lines, 1)
  ]


def named(jobs: Sequence[Job], kinds: Sequence[str], suffix: str) -> list[Job]:
  """The jobs with a name each, so that no two of them write one file.

  A name is the id, or the image's stem; one whose files are taken already gets
  a number: the second cup.jpg is cup_2.

  Args:
    jobs: in order.
    kinds: of files to be written, of `KINDS`.
    suffix: of images.
  """
  taken: set[str] = set()
  found = []
  for job in jobs:
    if not job.fault and job.id:
      job = dataclasses.replace(job, fault=_name_fault(job, job.id, suffix))
    if job.fault:
      found.append(job)
      continue
    stem = job.id or _fitting(job.image.stem, suffix)
    name, number = stem, 1
    while (files := _keys(name, kinds, suffix)) & taken:
      number += 1
      name = f"{stem}_{number}"
    taken |= files
    fault = _name_fault(job, name, suffix)
    found.append(dataclasses.replace(job, name=name, fault=fault))
  return found


def file_of(
  folder: pathlib.Path, name: str, suffix: str, kind: str
) -> pathlib.Path:
  """The file of a kind, of `IMAGES`."""
  part = "" if kind == "mask" else f"_{kind}"
  return folder / f"{name}{part}{suffix}"


def outputs(
  jobs: Sequence[Job], folder: pathlib.Path, suffix: str, kinds: Sequence[str]
) -> list[pathlib.Path]:
  """Every file that will be written."""
  found = [
    file_of(folder, job.name, suffix, kind)
    for job in jobs
    if not job.fault
    for kind in kinds
    if kind != "rle"
  ]
  return found + [folder / RECORDS] * ("rle" in kinds)


def require_writable(
  files: Sequence[pathlib.Path],
  inputs: Sequence[pathlib.Path],
  *,
  force: bool,
) -> None:
  """Refuses outputs that would overwrite something.

  Args:
    files: to be written.
    inputs: files that are read; never overwritten.
    force: other files may be overwritten.

  Raises:
    ConfigError: one exists or is an input, or its folder takes no files.
  """
  read = {identity for path in inputs for identity in _identities(path)}
  for file in files:
    if read & _identities(file):
      raise ConfigError(
        f"{file} is an input of this command; give another --out."
      )
    if (file.exists() or file.is_symlink()) and not force:
      raise ConfigError(f"{file} exists; give another --out or --force.")
    if file.is_dir():
      raise ConfigError(f"{file} is a folder; give another --out.")
  for folder in {file.parent for file in files}:
    require_folder(folder)


def require_folder(folder: pathlib.Path) -> None:
  """Refuses a folder that is none, or cannot be made or written to.

  Raises:
    ConfigError: it is so.
  """
  there = folder.absolute()
  while not there.exists() and there != there.parent:
    there = there.parent
  if not there.is_dir():
    raise ConfigError(f"{there} is a file; give a folder as --out.")
  if not os.access(there, os.W_OK | os.X_OK):
    raise ConfigError(f"cannot write to {there}; give another --out.")


def _identities(path: pathlib.Path) -> set[Any]:
  """What equal files share: names of links and, where it exists, the file."""
  found: set[Any] = {os.path.realpath(path)}
  try:
    status = path.stat()
  except (OSError, ValueError):
    return found
  return found | {(status.st_dev, status.st_ino)}


def _read_text(path: str) -> str:
  if path != "-":
    raw = input_files.read_bytes(pathlib.Path(path), most=_MAX_REQUESTS_BYTES)
  else:
    stream = getattr(sys.stdin, "buffer", None)
    raw = stream.read() if stream else sys.stdin.read().encode()
  try:
    return raw.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise DataError("it is not UTF-8 text.") from error


def _from_line(line: str, where: str, answer_prefix: str | None) -> Job:
  try:
    values = json.loads(line)
    fault = _line_fault(values)
  except (ValueError, RecursionError):
    values, fault = {}, "it is not JSON"
  if fault:
    return Job(pathlib.Path(), "", where=where, fault=f"{where}: {fault}.")
  # null is the same as an absent key.
  own = values.get("id")
  prefix = values.get("answer_prefix")
  return Job(
    pathlib.Path(values["image"]),
    values["text"],
    id="" if own is None else str(own),
    answer_prefix=answer_prefix if prefix is None else prefix,
    where=where,
    fault="" if own != "" else f"{where}: its id is empty.",
  )


def _line_fault(values: Any) -> str:
  """What is wrong with the values of a request."""
  wanted = 'write {"image": FILE, "text": REQUEST}'
  if not isinstance(values, Mapping):
    return wanted
  for key in ("image", "text"):
    if not isinstance(values.get(key), str) or not values[key]:
      return f'{wanted}; its "{key}" is {_shown(values.get(key))}'
  own, prefix = values.get("id"), values.get("answer_prefix")
  if isinstance(own, bool) or not isinstance(own, str | int | None):
    return f'its "id" is {_shown(own)}, which is not text'
  if not isinstance(prefix, str | None):
    return f'its "answer_prefix" is {_shown(prefix)}, which is not text'
  for key in values.keys() - _KEYS:
    if close := difflib.get_close_matches(key, _KEYS, 1):
      return f"it has an unknown key {key!r}; did you mean {close[0]!r}?"
  if "\0" in values["image"]:
    return "its image is no file name"
  return ""


def _shown(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 40 else f"{text[:40]}..."


def _name_fault(job: Job, name: str, suffix: str) -> str:
  """Why a name cannot be that of files; empty where it can."""
  where = f"{job.where}: " if job.where else ""
  try:
    size = len(f"{name}_overlay{suffix}".encode())
  except UnicodeEncodeError:
    return f"{where}id {name!r} is no file name: it contains half a character."
  if name in ("", ".", "..") or any(
    c in "/\\" or unicodedata.category(c) == "Cc" for c in name
  ):
    return f"{where}id {name!r} is no file name; use letters and digits."
  if size > _MAX_NAME:
    return f"{where}id {name[:20]!r}... is too long for a file name."
  return ""


def _fitting(stem: str, suffix: str) -> str:
  """A stem that leaves room for what its files are called."""
  room = _MAX_NAME - len(f"_overlay_99999{suffix}")
  return os.fsencode(stem)[:room].decode(errors="ignore")


def _keys(name: str, kinds: Sequence[str], suffix: str) -> set[str]:
  """Names of a job's files, equal where a disk may take them for one."""
  files = (
    file_of(pathlib.Path(), name, suffix, kind).name
    for kind in kinds
    if kind != "rle"
  )
  # Without files, the name itself tells records apart.
  return {
    unicodedata.normalize("NFC", file).casefold() for file in [*files, name]
  }


def _images(given: str) -> list[str]:
  """A file, the images of a folder or those that a pattern matches."""
  path = pathlib.Path(given)
  if path.is_dir():
    found = [
      str(p)
      for p in path.iterdir()
      if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
    ]
  elif glob.has_magic(given) and not path.exists():
    found = [p for p in _matches(path) if not os.path.isdir(p)]
  else:
    return [given]
  if not found:
    raise DataError(f"--image {given} contains no image.")
  return sorted(found)


def _matches(pattern: pathlib.Path) -> Iterator[str]:
  """Paths of a pattern; a part that exists as it is written is no pattern."""
  bases = [pattern.anchor]
  for part in pattern.parts[1 if pattern.anchor else 0 :]:
    found = []
    for base in bases:
      literal = os.path.join(base, part)
      if os.path.lexists(literal):
        found.append(literal)
        continue
      whole = os.path.join(glob.escape(base), part)
      # "**" is any number of folders.
      matches = glob.glob(whole, recursive=part == "**")
      if part == "**":
        matches = [m.rstrip(os.sep) for m in matches if os.path.isdir(m)]
        matches.append(base)
      found += matches
    bases = list(dict.fromkeys(found))
  yield from bases
