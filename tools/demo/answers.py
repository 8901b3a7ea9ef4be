"""What the page shows for images and requests; knows nothing of gradio."""

import html
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from argenseg_jax.data import image_codec
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.masks import run_lengths
from argenseg_jax.data.sources import interactive
from argenseg_jax.inference.predictor import Predictor
from argenseg_jax.inference.prompts import Turns
from argenseg_jax.inference.segment import Prediction
from argenseg_jax.visualize import render

MAX_REQUESTS = 8  # Of one image at once.
MAX_CHARACTERS = 500  # Of a request.


class Asked(NamedTuple):
  """One user's question: an image and what to find in it.

  Attributes:
    image: path of the upload; None where there is none.
    requests: one a line.
    template: "point" or "box" where `requests` names a place.
  """

  image: str | None
  requests: str
  template: str = ""


class Found(NamedTuple):
  """An image's answers, or what is wrong.

  Attributes:
    image: uint8 RGB [h w 3]; None where it could not be read.
    requests: what was asked; none where `fault` says why.
    predictions: one a request.
    seconds: that the batch took.
    fault: a sentence for the user, "" if all is well.
  """

  image: np.ndarray | None
  requests: list[str]
  predictions: list[Prediction]
  seconds: float
  fault: str = ""


class Answerer:
  """Answers questions of several users in one program call.

  Args:
    predictor: the model.
    batch_size: most requests of a program.
  """

  def __init__(self, predictor: Predictor, *, batch_size: int):
    self.predictor, self.batch_size = predictor, batch_size

  def warm_up(self) -> None:
    """Compiles the programs of batches of 1, 2, 4, ... requests."""
    sizes = range(int(math.log2(self.batch_size)) + 1)
    self.predictor.warm_up(batches=[2**n for n in sizes], longest=32)

  def __call__(self, questions: Sequence[Asked]) -> list[Found]:
    """One `Found` a question; a faulty question costs only itself."""
    began = time.perf_counter()
    faults: dict[int, str] = {}
    images: dict[int, np.ndarray] = {}
    requests: dict[int, list[str]] = {}
    for i, asked in enumerate(questions):
      try:
        requests[i] = _lines(asked)
        images[i] = _pixels(asked.image)
      except DataError as error:
        faults[i] = str(error)
    predictions = self._predict(questions, images, requests, faults)
    seconds = time.perf_counter() - began
    return [
      Found(
        images.get(i),
        [] if i in faults else requests[i],
        [] if i in faults else predictions[i],
        seconds,
        faults.get(i, ""),
      )
      for i in range(len(questions))
    ]

  def converse(
    self, image: str | None, turns: Turns
  ) -> tuple[np.ndarray | None, Prediction]:
    """The next answer of a conversation, and the image it is about.

    Raises:
      DataError: not an image, or a conversation that is too long.
    """
    if len(turns[-1]["value"]) > MAX_CHARACTERS:
      raise DataError(f"give at most {MAX_CHARACTERS} characters.")
    pixels = _pixels(image) if image else None
    return pixels, self.predictor.chat(turns, image=pixels)

  def _predict(self, questions, images, requests, faults):
    """Question -> predictions; adds to `faults` what the model refuses."""
    found: dict[int, list[Prediction]] = {}
    for template in sorted({asked.template for asked in questions}):
      rows = [
        (i, line)
        for i in images
        if i not in faults and questions[i].template == template
        for line in requests[i]
      ]
      for start in range(0, len(rows), self.batch_size):
        chunk = rows[start : start + self.batch_size]
        for (i, _), answer in zip(
          chunk, self._ask(chunk, images, template), strict=True
        ):
          if isinstance(answer, str):
            faults[i] = answer
          else:
            found.setdefault(i, []).append(answer)
    return found

  def _ask(self, chunk, images, template) -> list[Prediction | str]:
    """Answers, or the sentence that says why there is none."""
    try:
      return list(
        self.predictor.segment_batch(
          [images[i] for i, _ in chunk],
          [line for _, line in chunk],
          template=template,
        )
      )
    except DataError as error:
      if len(chunk) == 1:
        return [str(error)]
    # One of several is at fault: each alone, so that it costs only itself.
    return [self._ask([row], images, template)[0] for row in chunk]


def place_request(
  image: str, corners: Sequence[tuple[float, float]]
) -> tuple[str, str]:
  """The request and template of a clicked point or of a box's two corners.

  Args:
    image: path of the image that was clicked.
    corners: (x, y) in its pixels, one or two.

  Raises:
    DataError: not an image, or a box without area.
  """
  height, width = _pixels(image).shape[:2]
  (x, y), *rest = corners
  if not rest:
    return interactive.place_text((x / width, y / height)), "point"
  x2, y2 = rest[0]
  left, right = sorted((x / width, x2 / width))
  top, bottom = sorted((y / height, y2 / height))
  if left == right or top == bottom:
    raise DataError("the box has no area; click two opposite corners.")
  return interactive.place_text((left, top, right, bottom)), "box"


def overlays(found: Found, opacity: float) -> list[tuple[np.ndarray, str]]:
  """(uint8 RGB [h w 3], caption) of each request."""
  if found.image is None:
    return []
  return [
    (
      render.overlay(found.image, answer.seg_mask, opacity=opacity),
      f"{request}: {describe(answer)}",
    )
    for request, answer in zip(found.requests, found.predictions, strict=True)
  ]


def describe(answer: Prediction) -> str:
  """A few words: how much the mask covers, or that there is no such thing."""
  if not answer.has_mask:
    return "no such thing in this image"
  share = answer.seg_mask.mean()
  if not share:
    return "an empty mask: no such thing in this image"
  sure = math.exp(answer.confidence)
  return f"{share:.1%} of the image, confidence {sure:.0%} per code"


def report(found: Found) -> str:
  """Markdown: what the model said to each request, never read as tags."""
  if found.fault:
    return refusal(found.fault)
  lines = [
    f"- **{html.escape(request)}**: {html.escape(answer.text) or '(nothing)'} "
    f"({describe(answer)})"
    for request, answer in zip(found.requests, found.predictions, strict=True)
  ]
  return "\n".join([*lines, "", f"{found.seconds:.2f} s"])


def refusal(fault: str) -> str:
  """Markdown: a sentence that says why there is no answer."""
  return f"**Not answered:** {html.escape(fault)}"


def files(found: Found) -> tuple[list[str], list[str]]:
  """Paths of downloads (a PNG a mask, all masks as COCO run lengths) and of
  coarse-to-fine animations, in a folder of their own."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="argenseg_demo_"))
  masks, strips, records = [], [], []
  for i, (request, answer) in enumerate(
    zip(found.requests, found.predictions, strict=True), 1
  ):
    records.append(
      {
        "request": request,
        "answer": answer.text,
        "confidence": answer.confidence if answer.has_mask else None,
        "masks": [run_lengths(mask) for mask in answer.seg_masks],
      }
    )
    if answer.has_mask:
      path = folder / f"mask_{i}.png"
      answer.as_pil().save(path)
      masks.append(str(path))
      path = folder / f"scales_{i}.webp"
      render.write_animation(answer.strip, path)
      strips.append(str(path))
  if records:
    path = folder / "masks_rle.json"
    path.write_text(json.dumps(records, indent=1))
    masks.append(str(path))
  return masks, strips


def _lines(asked: Asked) -> list[str]:
  lines = [line.strip() for line in asked.requests.splitlines()]
  lines = [line for line in lines if line]
  if not lines:
    raise DataError("type a request, or click the object.")
  if len(lines) > MAX_REQUESTS:
    raise DataError(
      f"{len(lines)} requests at once are too many; give at most "
      f"{MAX_REQUESTS}, one a line."
    )
  for line in lines:
    if len(line) > MAX_CHARACTERS:
      raise DataError(
        f"a request has {len(line)} characters; give at most {MAX_CHARACTERS}."
      )
  return lines


def _pixels(image: str | None) -> np.ndarray:
  if not image:
    raise DataError("add an image first.")
  try:
    return image_codec.decode_image(pathlib.Path(image))
  except DataError as error:
    # The upload's path on the server is nobody's business.
    name = pathlib.Path(image).name
    raise DataError(str(error).replace(image, name)) from error
