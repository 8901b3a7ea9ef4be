"""How well codes are predicted when those before them are true, and whether
the image matters for that."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt8

from argenseg_jax import sharding
from argenseg_jax.data import pipeline
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import Row, stack_rows
from argenseg_jax.evaluation.segmentation_metrics import Sums
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.models import losses
from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
from argenseg_jax.models.teacher_forcing import Noise, prepare_inputs
from argenseg_jax.runtime import distributed
from argenseg_jax.types import IGNORE_TARGET, Batch

SAMPLES = 64  # Of a data set are measured.


@dataclasses.dataclass
class CodeSums(Sums):
  """Sums over the codes of true masks, [scales] each.

  Attributes:
    count: codes.
    loss: cross entropy over the whole vocabulary, in nats.
    shuffled_loss: the same with another sample's image.
    right: codes that are the likeliest of all codes.
  """

  count: Any
  loss: Any
  shuffled_loss: Any
  right: Any

  def results(self, sides: tuple[int, ...]) -> dict[str, float]:
    """Means; empty where there was no code.

    Args:
      sides: side lengths of the scales.
    """
    count, loss, shuffled, right = (
      np.asarray(x, np.float64)
      for x in (self.count, self.loss, self.shuffled_loss, self.right)
    )
    total = count.sum()
    if not total:
      return {}
    out = {
      "code_loss": loss.sum() / total,
      "grounding_gap": (shuffled.sum() - loss.sum()) / total,
      "token_acc": right.sum() / total,
    }
    for side, part, whole in zip(sides, right, count, strict=True):
      out[f"token_acc@{side}x{side}"] = part / whole
    return {name: float(value) for name, value in out.items()}


def code_sums(
  model: ARGenSeg, batch: Batch, others: UInt8[Array, "b i h w 3"]
) -> CodeSums:
  """The sums of a batch.

  Args:
    model: the whole model.
    batch: teacher forced.
    others: images to put in place of the batch's own.
  """
  inputs, targets, index = prepare_inputs(model, batch, Noise())

  def run(images):
    hidden = model(inputs._replace(images=normalize_images(images)))
    sums = losses.decoder_loss(
      hidden,
      model.llm.head,
      targets,
      index,
      batch.sample_weight,
      scales=model.scales,
    )
    return hidden, sums

  hidden, true = run(batch.images)
  _, shuffled = run(others)
  codes, *_ = scale_prediction(
    hidden,
    model.code_head.astype(hidden.dtype),
    model.vqvae.quantizer.codebook[...],
  )
  is_right = codes + model.config.token_ids.first_code == targets
  right = losses.count_targets(
    jnp.where(is_right, targets, IGNORE_TARGET),
    index,
    batch.sample_weight,
    model.scales,
  )
  return CodeSums(true.code_count, true.code, shuffled.code, right.code)


class CodeMeasurer:
  """Compiled once for a model.

  Args:
    graph: of an `ARGenSeg`.
  """

  def __init__(self, graph: nnx.GraphDef):
    @sharding.jit
    def measure(state, batch, others):
      sums = code_sums(nnx.merge(graph, state), batch, others)
      return tuple(vars(sums).values())

    self._measure = measure

  def __call__(
    self,
    state: nnx.State,
    rows: pipeline.RowMaker,
    *,
    batch_size: int,
    total: int,
    sides: tuple[int, ...],
  ) -> dict[str, float]:
    """The metrics of the first `SAMPLES` samples.

    Args:
      state: variables of the model.
      rows: the split.
      batch_size: rows of a pass, over all processes.
      total: samples of the split that are looked at.
      sides: side lengths of the model's scales.
    """
    total = min(total, SAMPLES)
    share = batch_size // jax.process_count()
    first = share * jax.process_index()
    empty = rows(len(rows.source))
    key = functools.cache(functools.partial(_image_key, rows))
    sums = None
    for start in range(0, total, batch_size):
      made, others = [], []
      for index in range(start + first, start + first + share):
        row = rows(index) if index < total else empty
        made.append(row)
        others.append(_other(rows, index, total, key) if index < total else row)
      batch, other = (_stacked(part) for part in (made, others))
      if not distributed.agree_any(bool(batch.mask_valid.any())):
        continue
      batch, images = sharding.put_rows((batch, other.images), state)
      one = CodeSums(*distributed.fetch(self._measure(state, batch, images)))
      sums = one if sums is None else sums + one
    return {} if sums is None else sums.results(sides)


def _stacked(rows: list[Row]) -> Batch:
  return stack_rows(rows)[0]


def _image_key(rows: pipeline.RowMaker, index: int) -> Any:
  """What tells a sample's images; None where it has none or is bad."""
  try:
    return rows.source[index].image_keys or None
  except DataError:
    return None


def _other(rows, index: int, total: int, key) -> Row:
  """The row of the next sample with another image; its own if all are of
  one."""
  for step in range(1, total):
    other = (index + step) % total
    if key(other) not in (None, key(index)):
      row = rows(other)
      if not row.bad:
        return row
  return rows(index)
