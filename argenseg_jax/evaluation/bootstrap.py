"""Intervals of metrics: images are drawn again, with all their samples."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from argenseg_jax.evaluation.segmentation_metrics import MetricSums

RESAMPLES = 1000
# Of `results`: numbers, not shares.
COUNTS = {
  *("samples", "invalid", "surplus", "questions", "captions"),
  "follows_pairs",
  *("yes_no_unclear", "choice_unclear"),
}
_CHUNK = 50  # Resamples at once: bounds memory at 50 x images numbers.


def intervals(
  sums: Sequence[MetricSums],
  images: Sequence[Hashable],
  *,
  share: float = 0.95,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> dict[str, tuple[float, float]]:
  """Percentile bootstrap intervals of every metric of `sums`.

  Samples of one image are alike, so whole images are drawn, with
  replacement, as many as there are; each draw's sums are divided once.

  Args:
    sums: one for each sample, of one class.
    images: which image each of them is about.
    share: of the resampled values that an interval holds.
    resamples: how often to draw.
    seed: of the drawing; the same seed gives the same intervals.

  Returns:
    Metric -> (low, high). Counts have none.
  """
  if not sums:
    return {}
  kind = type(sums[0])
  whole: dict[Hashable, MetricSums] = {}
  for image, one in zip(images, sums, strict=True):
    whole[image] = whole[image] + one if image in whole else one
  per_image = {
    f.name: np.array([getattr(s, f.name) for s in whole.values()], np.float64)
    for f in dataclasses.fields(kind)
  }
  rng = np.random.default_rng(seed)
  n = len(whole)
  drawn: dict[str, list[np.ndarray]] = {}
  for start in range(0, resamples, _CHUNK):
    count = min(_CHUNK, resamples - start)
    times = rng.multinomial(n, np.full(n, 1 / n), size=count)
    resampled = kind(
      **{name: times @ values for name, values in per_image.items()}
    )
    for name, values in resampled.results().items():
      drawn.setdefault(name, []).append(values)
  tail = 50 * (1 - share)
  return {
    name: tuple(
      np.nanpercentile(np.concatenate(values), (tail, 100 - tail)).tolist()
    )
    for name, values in drawn.items()
    if name not in COUNTS
  }
