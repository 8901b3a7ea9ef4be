"""Answered samples as JSON lines, and the metrics that follow from them alone.

Evaluation and re-scoring go through `Scorer`: a number that is printed can be
computed again from `predictions.jsonl` without a model or the data.
"""

import json
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Bool

from argenseg_jax.bootstrap import intervals
from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.metrics import SegmentationSums, score

FILE = "predictions.jsonl"
_NEEDED = ("sample", "picture", "text", "has_mask", "mask", "truth")


def record(
  index: int,
  sample: Sample,
  prediction: Bool[np.ndarray, "h w"],
  truth: Bool[np.ndarray, "h w"],
  *,
  has_mask: bool,
  text: str,
) -> dict[str, Any]:
  """One line of `predictions.jsonl`.

  Args:
    index: of the sample in its source.
    sample: that was asked about.
    prediction: the answered mask, empty if the answer held none.
    truth: the union of its targets, of the same size.
    has_mask: whether the answer held a mask.
    text: the answer's words.
  """
  picture = sample.image_keys or index
  return {
    "sample": index,
    "dataset": sample.dataset,
    "kind": sample.kind,
    # What tells equal pictures: intervals draw pictures, not samples.
    "picture": json.dumps(picture, default=str),
    "expressions": list(sample.expressions),
    "text": text,
    "has_mask": has_mask,
    "mask": masks.run_lengths(prediction),
    "truth": masks.run_lengths(truth),
  }


class Scorer:
  """Adds up records; `results` divides once."""

  def __init__(self) -> None:
    self.sums = SegmentationSums()
    self._by_sample: list[SegmentationSums] = []
    self._pictures: list[str] = []

  def add(self, record: dict[str, Any]) -> float:
    """Counts a record in; returns its IoU.

    Raises:
      ValueError: its masks differ in size.
    """
    one = score(
      _pixels(record["mask"]),
      _pixels(record["truth"]),
      has_mask=record["has_mask"],
      text=record["text"],
    )
    self.sums += one
    self._by_sample.append(one)
    self._pictures.append(record["picture"])
    return one.iou

  def results(self) -> dict[str, Any]:
    """Every metric of docs/evaluation.md that masks and text give, with the
    ends of the 95 % intervals of cIoU and gIoU."""
    metrics = self.sums.results()
    found = intervals(self._by_sample, self._pictures)
    for name in {"ciou", "giou"} & found.keys():
      low, high = found[name]
      metrics |= {f"{name}_low": low, f"{name}_high": high}
    return metrics


def keep_whole_batches(path: pathlib.Path, size: int) -> list[dict[str, Any]]:
  """The records of an interrupted evaluation, up to its last batch but one.

  The file is cut to them (a copy takes its place at once), so that going on
  appends to it. The last batch may be incomplete and is answered again: in
  another company, padding may be longer and an answer differ.

  Args:
    path: may be absent.
    size: of a batch.
  """
  found = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found.append(json.loads(line))
    except ValueError:  # Cut off by a kill.
      break
  end = found[-1]["sample"] // size * size if found else 0
  kept = [values for values in found if values["sample"] < end]
  copy = path.with_suffix(".new")
  copy.write_text("".join(json.dumps(values) + "\n" for values in kept))
  copy.replace(path)
  return kept


def rescore(path: str | pathlib.Path) -> dict[str, Any]:
  """The metrics of a `predictions.jsonl`.

  Raises:
    DataError: it cannot be read; the line is named.
  """
  scorer = Scorer()
  try:
    with pathlib.Path(path).open() as lines:
      for number, line in enumerate(lines, 1):
        try:
          values = json.loads(line)
          scorer.add({key: values[key] for key in _NEEDED})
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
  if not scorer.sums.samples:
    raise DataError(f"{path} holds no answered sample.")
  return scorer.results()


def _pixels(coded: dict[str, Any]) -> np.ndarray:
  return masks.load_seg_mask(coded) > 0
