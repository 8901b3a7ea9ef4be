"""Segmentation metrics as mergeable sums: add over batches and hosts, divide
once."""

import dataclasses

import numpy as np

_PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclasses.dataclass
class SegmentationSums:
  """Sums over samples; `a + b` merges two of them.

  Attributes:
    samples: samples with a weight above zero.
    intersection: foreground pixels that prediction and truth share.
    union: foreground pixels of either.
    iou: sum of per-sample IoU, 1 where both masks are empty.
    hits: samples with IoU above 0.5, 0.6, 0.7, 0.8, 0.9.
    no_target: samples whose truth is empty.
    no_target_right: those answered with an empty mask.
    target_right: samples with a target answered with a non-empty mask.
    invalid: samples with a target answered without a mask (scored as empty).
  """

  samples: int = 0
  intersection: int = 0
  union: int = 0
  iou: float = 0.0
  hits: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(len(_PRECISIONS), np.int64)
  )
  no_target: int = 0
  no_target_right: int = 0
  target_right: int = 0
  invalid: int = 0

  def __add__(self, other: "SegmentationSums") -> "SegmentationSums":
    return SegmentationSums(
      **{
        f.name: getattr(self, f.name) + getattr(other, f.name)
        for f in dataclasses.fields(self)
      }
    )

  def results(self) -> dict[str, float]:
    """Named metrics; shares and IoUs in 0..1.

    cIoU divides summed intersections by summed unions + 1e-10; gIoU is the
    mean per-sample IoU (not the box loss); N-acc and T-acc are left out where
    no sample counts for them.
    """
    n = max(self.samples, 1)
    out = {
      "ciou": self.intersection / (self.union + 1e-10),
      "giou": self.iou / n,
    }
    for threshold, hits in zip(_PRECISIONS, self.hits, strict=True):
      out[f"pr@{threshold}"] = float(hits) / n
    with_target = self.samples - self.no_target
    if self.no_target:
      out["n_acc"] = self.no_target_right / self.no_target
    if with_target:
      out["t_acc"] = self.target_right / with_target
    out["invalid"] = self.invalid
    out["samples"] = self.samples
    return out


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
  prediction: np.ndarray, truth: np.ndarray, *, has_mask: bool = True
) -> SegmentationSums:
  """The sums of one sample.

  Args:
    prediction: bool [h w]; empty if the answer held no mask.
    truth: bool [h w], at the picture's own size.
    has_mask: whether the answer held a mask.
  """
  intersection, union = overlap(prediction, truth)
  iou = intersection / (union + 1e-10) if union else 1.0
  empty_truth, empty_answer = not truth.any(), not prediction.any()
  return SegmentationSums(
    samples=1,
    intersection=intersection,
    union=union,
    iou=iou,
    hits=np.array([int(iou > p) for p in _PRECISIONS], np.int64),
    no_target=int(empty_truth),
    no_target_right=int(empty_truth and empty_answer),
    target_right=int(not empty_truth and not empty_answer),
    invalid=int(not has_mask and not empty_truth),
  )
