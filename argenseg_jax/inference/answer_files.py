"""Files of answers: masks, overlays, strips and predictions.jsonl."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from argenseg_jax.config import ConfigError
from argenseg_jax.data.masks import run_lengths
from argenseg_jax.inference import requests
from argenseg_jax.inference.requests import Job
from argenseg_jax.inference.segment import Prediction
from argenseg_jax.visualize import render


class AnswerFiles(contextlib.AbstractContextManager):
  """Writes answers as they come.

  Args:
    folder: of all files.
    suffix: of images; one of `requests.LOSSLESS`.
    kinds: of files, of `requests.KINDS`.
    force: overwrite files that exist.

  Raises:
    ConfigError: another process writes the same records, or has written a file
      since this one began.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    suffix: str,
    kinds: Sequence[str],
    *,
    force: bool,
  ):
    self._folder, self._suffix, self._force = folder, suffix, force
    self._kinds = [kind for kind in requests.IMAGES if kind in kinds]
    self._records = None
    if "rle" in kinds:
      self._records = self._open_records(folder / requests.RECORDS)

  def __call__(
    self,
    job: Job,
    image: UInt8[np.ndarray, "h w 3"],
    answer: Prediction,
  ) -> list[pathlib.Path]:
    """Writes an answer; returns its image files."""
    draw = {
      "mask": lambda: answer.seg_mask,
      "overlay": lambda: render.overlay(image, answer.seg_mask),
      "strip": lambda: render.join_strip(answer.strip, 128),
    }
    files = {
      kind: requests.file_of(self._folder, job.name, self._suffix, kind)
      for kind in self._kinds
    }
    for kind, file in files.items():
      self._draw(file, draw[kind]())
    if self._records is not None:
      self._records.write(json.dumps(_record(job, answer, files)) + "\n")
      self._records.flush()
    return list(files.values())

  def __exit__(self, *_) -> None:
    if self._records is not None:
      self._records.close()

  def _draw(self, path: pathlib.Path, pixels: np.ndarray) -> None:
    lossless = {"lossless": True} if path.suffix.lower() == ".webp" else {}
    format = Image.registered_extensions()[path.suffix.lower()]
    with self._taken(path), path.open("wb" if self._force else "xb") as file:
      Image.fromarray(pixels).save(file, format, **lossless)

  def _open_records(self, path: pathlib.Path) -> TextIO:
    with self._taken(path):
      file = path.open("a" if self._force else "x", encoding="utf-8")
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        file.close()
        raise FileExistsError from error
    file.truncate(0)  # Now that nobody else writes to it.
    return file

  @contextlib.contextmanager
  def _taken(self, path: pathlib.Path) -> Iterator[None]:
    try:
      yield
    except FileExistsError as error:
      raise ConfigError(
        f"another command writes {path} now; give another --out."
      ) from error


def _record(
  job: Job, answer: Prediction, files: dict[str, pathlib.Path]
) -> dict[str, Any]:
  """A line of predictions.jsonl."""
  return {
    "id": job.id or job.name,
    "image": str(job.image),
    "request": job.text,
    "answer": answer.text,
    "confidence": answer.confidence if answer.has_mask else None,
    "masks": [run_lengths(mask) for mask in answer.seg_masks],
    "files": {kind: file.name for kind, file in files.items()},
  }
