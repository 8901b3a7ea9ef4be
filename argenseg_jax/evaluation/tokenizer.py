"""What an image tokenizer keeps of masks that are only encoded and decoded.

No model that predicts its codes can draw better masks.
"""

import dataclasses
from typing import Any

import cv2
import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, UInt8

from argenseg_jax import sharding
from argenseg_jax.data import pipeline
from argenseg_jax.evaluation.evaluator import batches
from argenseg_jax.evaluation.segmentation_metrics import Sums, overlap
from argenseg_jax.inference.segment import seg_mask_at_size, to_uint8
from argenseg_jax.models.argenseg import normalize_seg_masks
from argenseg_jax.runtime import distributed

_TOLERANCE = 0.008  # Of the image's diagonal, for boundaries.


@dataclasses.dataclass
class CeilingSums(Sums):
  """Sums over masks, each [prefixes], one for each number of scales decoded.

  Attributes:
    samples: masks.
    intersection, union: foreground pixels.
    iou: sum of per-mask IoU.
    boundary: sum of per-mask boundary F.
    psnr: sum of per-image PSNR, where images are encoded instead of masks.
  """

  samples: Any = 0
  intersection: Any = 0
  union: Any = 0
  iou: Any = 0.0
  boundary: Any = 0.0
  psnr: Any = 0.0

  def results(self) -> list[dict[str, float]]:
    """cIoU, gIoU and boundary F of each prefix; of images, PSNR."""
    n = np.maximum(self.samples, 1)
    if np.any(self.psnr):
      return [{"psnr": float(value)} for value in self.psnr / n]
    ciou = self.intersection / (self.union + 1e-10)
    columns = zip(ciou, self.iou / n, self.boundary / n, strict=True)
    names = ("ciou", "giou", "boundary_f")
    return [dict(zip(names, map(float, c), strict=True)) for c in columns]


def ceiling_score(
  predictions: list[Bool[np.ndarray, "h w"]], truth: Bool[np.ndarray, "h w"]
) -> CeilingSums:
  """The sums of one mask, decoded from each prefix of its scales."""
  pairs = np.array([overlap(p, truth) for p in predictions], np.int64)
  shared, union = pairs.T
  return CeilingSums(
    samples=np.ones(len(pairs), np.int64),
    intersection=shared,
    union=union,
    iou=np.where(union > 0, shared / np.maximum(union, 1), 1.0),
    boundary=np.array([boundary_f(p, truth) for p in predictions]),
  )


def image_score(
  decoded: UInt8[np.ndarray, "p h w 3"], truth: UInt8[np.ndarray, "h w 3"]
) -> CeilingSums:
  """The sums of one image, decoded from each prefix of its scales."""
  error = (decoded.astype(np.float64) - truth) ** 2
  error = np.maximum(error.mean((1, 2, 3)), 1e-2)  # At most 68 dB.
  count = np.ones(len(decoded), np.int64)
  return CeilingSums(samples=count, psnr=10 * np.log10(255**2 / error))


def boundary_f(
  prediction: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]
) -> float:
  """F measure of two masks' boundaries, 1 where both have none.

  A boundary pixel is right if the other boundary has one within 0.8 % of the
  image's diagonal (at least one pixel).
  """
  edges = [_edge(prediction), _edge(truth)]
  if not edges[0].any() or not edges[1].any():
    return float(edges[0].any() == edges[1].any())
  reach = max(1.0, float(np.ceil(_TOLERANCE * np.hypot(*truth.shape))))
  precision, recall = (
    float((_distance_to(other)[own] <= reach).mean())
    for own, other in (edges, edges[::-1])
  )
  return 2 * precision * recall / max(precision + recall, 1e-10)


def _edge(mask: np.ndarray) -> np.ndarray:
  """Foreground pixels with background, or the image's end, beside them."""
  padded = np.pad(mask.astype(np.uint8), 1)
  cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
  return mask & ~(cv2.erode(padded, cross)[1:-1, 1:-1] > 0)


def _distance_to(edge: np.ndarray) -> np.ndarray:
  return cv2.distanceTransform(
    (~edge).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
  )


def _round_trip(graph: nnx.GraphDef, every_prefix: bool):
  """(state, seg_masks) -> codes and uint8 images, of each prefix of scales."""

  @sharding.jit
  def round_trip(state, seg_masks):
    model = nnx.merge(graph, state)
    b, m = seg_masks.shape[:2]
    pixels = normalize_seg_masks(seg_masks)
    codes = model.encode(pixels.reshape(b * m, *pixels.shape[2:]))
    if every_prefix:
      decoded = model.decode_prefixes(codes)
    else:
      decoded = model.decode(codes)[:, None]
    found = (codes, to_uint8(decoded))
    return jax.tree.map(lambda x: x.reshape(b, m, *x.shape[1:]), found)

  return round_trip


def tokenizer_ceiling(
  graph: nnx.GraphDef,
  state: nnx.State,
  rows: pipeline.RowMaker,
  *,
  batch_size: int,
  max_samples: int,
  every_prefix: bool = False,
) -> dict[str, Any]:
  """Scores every mask of a split, encoded and decoded, at its own size.

  Args:
    graph, state: of a `VQVAE`.
    rows: the split.
    batch_size: samples a program takes, over all processes; rounded up so that
      each device gets as many.
    max_samples: 0 takes all.
    every_prefix: also decode the first scale alone, the first two, ...

  Returns:
    ciou, giou, boundary_f (of images instead psnr, in dB at the tokenizer's
    size), samples (masks), codes_used, perplexity (of the
    codes, all scales together), and with `every_prefix` "prefixes": a list by
    number of scales of {"side", "ciou", "giou", "boundary_f", "codes_used",
    "perplexity"}, the last two of that scale alone.
  """
  round_trip = _round_trip(graph, every_prefix)
  mesh = sharding.mesh_of(state)
  shards = 1 if mesh is None else sharding.num_shards(mesh)
  size = -(-batch_size // shards) * shards
  total = min(max_samples or len(rows.source), len(rows.source))
  model = nnx.merge(graph, state)
  scales, num_codes = model.quantizer.scales, model.quantizer.codebook.shape[0]
  prefixes = len(scales) if every_prefix else 1
  sums = CeilingSums(*(np.zeros(prefixes) for _ in range(6)))
  counts = np.zeros((len(scales), num_codes), np.int64)
  for batch in batches(rows, size, total):
    found = round_trip(state, sharding.put_rows(batch.seg_masks, state))
    codes, decoded = map(distributed.own_rows, found)
    for i, j in np.argwhere(batch.mask_valid):
      sample = rows.source[int(batch.sample_id[i])]
      if j < sample.num_past_masks:  # An earlier sample's.
        continue
      if sample.target == "picture":
        sums += image_score(decoded[i, j], batch.seg_masks[i, j])
      else:
        truth = sample.load_seg_mask(j)
        drawn = [
          seg_mask_at_size(x, truth.shape, pad_square=rows.config.pad_square)
          for x in decoded[i, j]
        ]
        sums += ceiling_score(drawn, truth)
      np.add.at(counts, (scales.scale_of_code, codes[i, j]), 1)
  own = [[np.asarray(v).tolist() for v in (*vars(sums).values(), counts)]]
  parts = zip(*distributed.gathered(own), strict=True)
  *fields, counts = (np.sum(part, axis=0) for part in parts)
  scores = CeilingSums(*fields).results()
  out = scores[-1] | {
    "samples": int(fields[0][0]),
    "codes_used": int(np.count_nonzero(counts.sum(0))),
    "perplexity": perplexity(counts.sum(0)),
  }
  if every_prefix:
    out["prefixes"] = [
      {
        "side": side,
        **one,
        "codes_used": int(np.count_nonzero(used)),
        "perplexity": perplexity(used),
      }
      for side, one, used in zip(scales.sides, scores, counts, strict=True)
    ]
  return out


def perplexity(counts: np.ndarray) -> float:
  """exp of the entropy of how often each code is used; 1 for a single one."""
  chance = counts[counts > 0] / max(counts.sum(), 1)
  return float(np.exp(-(chance * np.log(chance)).sum()))
