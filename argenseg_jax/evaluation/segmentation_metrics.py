"""Metrics as mergeable sums: add over samples and hosts, divide once.

docs/evaluation.md has the formulas. Fields may be arrays with one entry for
each of several resampled sums (`bootstrap.py`); results then are arrays too.
"""

import abc
import dataclasses
from typing import Any, Self

import numpy as np

from argenseg_jax.data import boxes

PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
_BOX_THRESHOLD = 0.5


@dataclasses.dataclass
class Sums:
  """A dataclass of numbers; `a + b` merges two of them."""

  def __add__(self, other: Self) -> Self:
    return type(self)(
      **{
        f.name: getattr(self, f.name) + getattr(other, f.name)
        for f in dataclasses.fields(self)
      }
    )


class MetricSums(Sums, abc.ABC):
  """Sums that divide into named metrics."""

  @abc.abstractmethod
  def results(self) -> dict[str, Any]:
    """The metrics by name."""


def _hits() -> np.ndarray:
  return np.zeros(len(PRECISIONS), np.int64)


@dataclasses.dataclass
class SegmentationSums(MetricSums):
  """Sums over answered masks.

  A sample is a mask that was due, or a request of something absent.

  Attributes:
    samples: that were scored.
    intersection: foreground pixels that prediction and truth share.
    union: foreground pixels of either.
    iou: sum of per-sample IoU, 1 where both masks are empty.
    hits: samples with IoU above 0.5, 0.6, 0.7, 0.8, 0.9.
    no_target: samples whose truth is empty.
    no_target_right: those answered with an empty mask.
    target_right: samples with a target answered with a non-empty mask.
    invalid: samples with a target answered without a mask (scored as empty).
    surplus: masks beyond those that answers should hold; not scored.
    box_hits: samples with a target whose answered mask's box has IoU >= 0.5
      with the box of the true mask.
    text_boxes: samples with a target whose answer holds a box in text.
    text_box_hits: those whose box has IoU >= 0.5.
  """

  samples: int = 0
  intersection: int = 0
  union: int = 0
  iou: float = 0.0
  hits: np.ndarray = dataclasses.field(default_factory=_hits)
  no_target: int = 0
  no_target_right: int = 0
  target_right: int = 0
  invalid: int = 0
  surplus: int = 0
  box_hits: int = 0
  text_boxes: int = 0
  text_box_hits: int = 0

  def results(self) -> dict[str, Any]:
    """Named metrics; shares and IoUs in 0..1.

    cIoU divides summed intersections by summed unions + 1e-10; gIoU is the
    mean per-sample IoU (not the box loss). N-acc, T-acc and box accuracy are
    left out where no sample counts for them.
    """
    n = np.maximum(self.samples, 1)
    out = {
      "ciou": self.intersection / (self.union + 1e-10),
      "giou": self.iou / n,
    }
    for i, threshold in enumerate(PRECISIONS):
      out[f"pr@{threshold}"] = self.hits[..., i] / n
    if np.any(self.no_target):
      out["n_acc"] = share(self.no_target_right, self.no_target)
    with_target = self.samples - self.no_target
    if np.any(with_target):
      out["t_acc"] = share(self.target_right, with_target)
      out["box_acc@0.5"] = share(self.box_hits, with_target)
      if np.any(self.text_boxes):
        out["text_box_acc@0.5"] = share(self.text_box_hits, with_target)
    out["invalid"] = self.invalid
    if np.any(self.surplus):
      out["surplus"] = self.surplus
    out["samples"] = self.samples
    return {name: plain(value) for name, value in out.items()}


def overlap(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
  """Foreground intersection and union of two bool [h w] masks, in pixels."""
  if prediction.shape != truth.shape:
    raise ValueError(
      f"predicted mask {prediction.shape} and true mask {truth.shape} differ "
      "in size."
    )
  intersection = int(np.count_nonzero(prediction & truth))
  return intersection, int(np.count_nonzero(prediction | truth))


def score(
  prediction: np.ndarray,
  truth: np.ndarray,
  *,
  has_mask: bool = True,
  text: str = "",
  surplus: int = 0,
  ignore: np.ndarray | None = None,
) -> SegmentationSums:
  """The sums of one sample.

  Args:
    prediction: bool [h w]; empty if the answer held no mask.
    truth: bool [h w], at the image's own size.
    has_mask: whether the answer held a mask.
    text: the answer, where a box may stand.
    surplus: masks of the answer that nothing asked for.
    ignore: bool [h w], pixels that count as neither (ReasonSeg's rule).
  """
  if ignore is not None:
    if ignore.shape != truth.shape:
      raise ValueError(
        f"true mask {truth.shape} and ignored pixels {ignore.shape} differ in "
        "size."
      )
    prediction, truth = prediction & ~ignore, truth & ~ignore
  intersection, union = overlap(prediction, truth)
  iou = intersection / (union + 1e-10) if union else 1.0
  empty_truth, empty_answer = not truth.any(), not prediction.any()
  true_box, said = boxes.mask_box(truth), boxes.text_box(text)
  box_iou = boxes.box_iou(boxes.mask_box(prediction), true_box)
  said_iou = boxes.box_iou(said, true_box)
  return SegmentationSums(
    samples=1,
    intersection=intersection,
    union=union,
    iou=iou,
    hits=np.array([int(iou > p) for p in PRECISIONS], np.int64),
    no_target=int(empty_truth),
    no_target_right=int(empty_truth and empty_answer),
    target_right=int(not empty_truth and not empty_answer),
    invalid=int(not has_mask and not empty_truth),
    surplus=surplus,
    box_hits=int(box_iou >= _BOX_THRESHOLD),
    text_boxes=int(not empty_truth and said is not None),
    text_box_hits=int(said_iou >= _BOX_THRESHOLD),
  )


def share(part: Any, whole: Any) -> Any:
  """part / whole, not a number where a resample drew nothing of that kind."""
  part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
  return part / np.where(whole == 0, np.nan, whole)


def plain(value: Any) -> Any:
  """Numbers as Python has them, which JSON takes."""
  return value.item() if isinstance(value, np.generic) else value
