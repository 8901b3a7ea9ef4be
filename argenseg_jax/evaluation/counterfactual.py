"""Whether masks follow the request: the same image, asked for something else.

The answers to two requests of one image are a counterfactual pair: the request
changed and the image did not.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import numpy as np
from jaxtyping import Bool

from argenseg_jax.data import masks
from argenseg_jax.evaluation.segmentation_metrics import (
  MetricSums,
  plain,
  share,
)

_SAME = 0.5  # Truths with this IoU or more are of one object.


@dataclasses.dataclass
class FollowSums(MetricSums):
  """Sums over ordered pairs of requests of one image.

  Attributes:
    moves: pairs of requests for two objects.
    followed: those whose second mask meets its own object more than the first.
    absences: pairs of an object and something absent.
    emptied: those whose second mask is empty, or none.
  """

  moves: int = 0
  followed: int = 0
  absences: int = 0
  emptied: int = 0

  def results(self) -> dict[str, Any]:
    """Shares of the pairs; empty where no image had two requests."""
    out: dict[str, Any] = {}
    if np.any(self.moves):
      out["follows"] = share(self.followed, self.moves)
    if np.any(self.absences):
      out["follows_absent"] = share(self.emptied, self.absences)
    if out:
      out["follows_pairs"] = self.moves + self.absences
    return {name: plain(value) for name, value in out.items()}


class Pairs:
  """Answers by image, as run lengths."""

  def __init__(self) -> None:
    self._images: defaultdict[tuple[Hashable, tuple], list[tuple]]
    self._images = defaultdict(list)

  def add(
    self,
    image: Hashable,
    request: Hashable,
    prediction: Bool[np.ndarray, "h w"],
    truth: Bool[np.ndarray, "h w"],
  ) -> None:
    """Notes a mask of an answer; keys tell equal images and requests."""
    coded = masks.run_lengths(prediction), masks.run_lengths(truth)
    answer = (request, *coded, bool(prediction.any()), bool(truth.any()))
    self._images[image, truth.shape].append(answer)

  def sums(self) -> dict[Hashable, FollowSums]:
    """Of each image that was asked about more than once."""
    return {
      image: _sums(answers)
      for (image, _), answers in self._images.items()
      if len(answers) > 1
    }


def _sums(answers: list[tuple]) -> FollowSums:
  requests, predictions, truths, *flags = zip(*answers, strict=True)
  drew, has_object = map(np.array, flags)
  other = np.array([[a != b for b in requests] for a in requests])
  # [old new]: the new request's mask on the old request's object.
  stayed = masks.overlaps(predictions, truths).T
  moved = np.diag(stayed)[None]
  differ = masks.overlaps(truths, truths) < _SAME
  pairs = has_object[:, None] & has_object[None] & differ & other
  gone = has_object[:, None] & ~has_object[None] & other
  return FollowSums(
    moves=int(pairs.sum()),
    followed=int((pairs & (moved > stayed)).sum()),
    absences=int(gone.sum()),
    emptied=int((gone & ~drew[None]).sum()),
  )
