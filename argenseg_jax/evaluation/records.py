"""Answered samples as JSON lines, and the metrics that follow from them alone.

Evaluation and re-scoring go through `Scorer`: a number that is printed can be
computed again from `predictions.jsonl` without a model or the data.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.data.text import unescape
from argenseg_jax.evaluation.bootstrap import intervals
from argenseg_jax.evaluation.counterfactual import FollowSums, Pairs
from argenseg_jax.evaluation.segmentation_metrics import (
  MetricSums,
  SegmentationSums,
  score,
)
from argenseg_jax.evaluation.vqa_metrics import UnderstandingSums, score_answer
from argenseg_jax.runtime.paths import as_path

FILE = "predictions.jsonl"
_NEEDED = {
  True: ("sample", "picture", "text", "has_mask", "mask", "truth"),
  False: ("sample", "picture", "text", "kind", "question", "answers"),
}
# What tells the lines of a file apart.
_KEY = ("dataset", "sample", "number")
# Of these metrics the 95 % intervals are given.
_WITH_INTERVAL = {
  *("ciou", "giou", "follows", "yes_no_accuracy", "yes_no_f1", "vqa_soft"),
  *("choice_accuracy", "text_exact", "pope_accuracy", "pope_f1"),
  *("vqa_accuracy", "mmmu_accuracy", "scienceqa_accuracy"),
}


def due_masks(sample: Sample) -> int:
  """How many masks of an answer are scored; 0 for a question that wants words.

  A request of something absent is scored with an empty true mask.
  """
  count = len(sample.seg_masks) - sample.num_past_masks
  asks_for_mask = sample.kind == "absent" or not sample.conversation
  return max(count, int(asks_for_mask))


def true_seg_masks(sample: Sample) -> list[Bool[np.ndarray, "h w"]]:
  """What each due mask should be, at the image's own size."""
  numbers = range(sample.num_past_masks, len(sample.seg_masks))
  if numbers:
    return [sample.load_seg_mask(i) for i in numbers]
  if not due_masks(sample):
    return []
  return [np.zeros(sample.load_image().shape[:2], bool)]


def records(
  index: int,
  sample: Sample,
  predictions: Sequence[Bool[np.ndarray, "h w"]],
  truths: Sequence[Bool[np.ndarray, "h w"]],
  *,
  text: str,
) -> list[dict[str, Any]]:
  """The lines of `predictions.jsonl` of an answer: one a due mask, or one.

  Args:
    index: of the sample in its source.
    sample: that was asked about.
    predictions: the answered masks, in order.
    truths: from `true_seg_masks`.
    text: the answer's words.
  """
  image = sample.image_keys or index
  human = [t["value"] for t in sample.conversation if t["from"] == "human"]
  common = {
    "sample": index,
    "dataset": sample.dataset,
    "kind": sample.kind,
    # What tells equal images: intervals draw images, not samples.
    "picture": json.dumps(image, default=str),
    "turn": max(len(human) - 1, 0),
    "expressions": list(sample.expressions),
    "question": unescape(human[-1]) if human else "",
    "text": text,
  }
  if not truths:
    true = [unescape(sample.conversation[-1]["value"])]
    return [common | {"answers": list(sample.answers) or true}]
  made = []
  for number, truth in enumerate(truths):
    has_mask = number < len(predictions)
    prediction = predictions[number] if has_mask else np.zeros_like(truth)
    last = number == len(truths) - 1
    ignore = sample.load_ignore(sample.num_past_masks + number)
    ignored = {} if ignore is None else {"ignore": masks.run_lengths(ignore)}
    made.append(
      common
      | ignored
      | {
        "number": number,
        "has_mask": has_mask,
        "mask": masks.run_lengths(prediction),
        "truth": masks.run_lengths(truth),
        "surplus": max(len(predictions) - len(truths), 0) if last else 0,
      }
    )
  return made


class Scorer:
  """Adds up records; `results` divides once."""

  def __init__(self) -> None:
    self.masks = SegmentationSums()
    self.words = UnderstandingSums()
    self._pairs = Pairs()
    self._one_by_one: dict[type, list[tuple[MetricSums, str]]] = {}

  @property
  def count(self) -> int:
    """Records that were added."""
    return self.masks.samples + self.words.questions

  @property
  def note(self) -> str:
    """The running result, for a progress bar."""
    if self.masks.samples:
      return f"cIoU {self.masks.results()['ciou']:.3f}"
    shown = self.words.results().items()
    return " ".join(f"{k} {v:.3f}" for k, v in shown if isinstance(v, float))

  def add(self, record: dict[str, Any]) -> float:
    """Counts a record in; returns its IoU, or the score of its words.

    Raises:
      ValueError: its masks differ in size, or its question has no answer.
    """
    if "mask" in record:
      prediction, truth = pixels(record["mask"]), pixels(record["truth"])
      one = score(
        prediction,
        truth,
        has_mask=record["has_mask"],
        text=record["text"],
        surplus=record.get("surplus", 0),
        ignore=pixels(record["ignore"]) if "ignore" in record else None,
      )
      value = one.iou
      self.masks += one
      request = record.get("dataset"), record["sample"]
      self._pairs.add(record["picture"], request, prediction, truth)
    else:
      one, value = score_answer(
        record["kind"],
        record["text"],
        record["answers"],
        question=record["question"],
      )
      self.words += one
    self._one_by_one.setdefault(type(one), []).append((one, record["picture"]))
    return value

  def results(self) -> dict[str, Any]:
    """Every metric of docs/evaluation.md that masks and text give, with the
    ends of 95 % intervals of the main ones."""
    metrics: dict[str, Any] = {}
    if self.masks.samples or not self.words.questions:
      metrics |= self.masks.results()
    if self.words.questions:
      metrics |= self.words.results()
    followed = self._pairs.sums()
    metrics |= sum(followed.values(), FollowSums()).results()
    by_image = [(sums, image) for image, sums in followed.items()]
    for pairs in (*self._one_by_one.values(), by_image):
      found = intervals(*zip(*pairs, strict=True)) if pairs else {}
      for name in sorted(_WITH_INTERVAL & found.keys()):
        low, high = found[name]
        metrics |= {f"{name}_low": low, f"{name}_high": high}
    return metrics


def rescore(path: str | pathlib.Path) -> dict[str, Any]:
  """The metrics of a `predictions.jsonl`.

  Raises:
    DataError: it cannot be read, or answers a question twice; the line is
      named.
  """
  scorer = Scorer()
  seen: dict[tuple, int] = {}
  try:
    with as_path(path).open("rb") as lines:
      for number, line in enumerate(lines, 1):
        if not line.strip():
          continue
        try:
          values = json.loads(line.decode("utf-8"))
          for key in _NEEDED["mask" in values]:
            values[key]
          if not isinstance(values["picture"], str):
            raise TypeError(f"picture {values['picture']!r} is no name")
          key = tuple(json.dumps(values.get(key)) for key in _KEY)
          if key in seen:
            raise ValueError(
              f"sample {values['sample']} stands in line {seen[key]} already"
            )
          seen[key] = number
          scorer.add(values)
        except (
          *(DataError, ValueError, KeyError, TypeError),
          *(AttributeError, RecursionError),
        ) as error:
          raise DataError(
            f"{path}:{number} is not an answered sample ({error}); give a "
            f"{FILE} of `argenseg eval`."
          ) from error
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{path} cannot be read ({error}).") from error
  if not scorer.count:
    raise DataError(f"{path} contains no answered sample.")
  return scorer.results()


def pixels(coded: dict[str, Any]) -> np.ndarray:
  """The bool [h w] mask of COCO's run lengths."""
  return masks.load_seg_mask(coded)
