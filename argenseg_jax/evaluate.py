"""Measures a model on a split: masks, the image tokenizer, grounding."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from argenseg_jax import checkpoint, distributed, sharding
from argenseg_jax import rows as rows_lib
from argenseg_jax.bootstrap import intervals
from argenseg_jax.config import EvalConfig, RunConfig
from argenseg_jax.data import pipeline
from argenseg_jax.metrics import SegmentationSums, score
from argenseg_jax.models.argenseg import normalize_seg_masks
from argenseg_jax.monitor import Progress
from argenseg_jax.predict import (
  answer_batch,
  answer_tokens,
  left_pad,
  seg_mask_at_size,
  to_uint8,
)
from argenseg_jax.train_step import grounding_gap
from argenseg_jax.types import Batch

OnProgress = Callable[[int, int, str], None]  # done, total, note


@dataclasses.dataclass(frozen=True)
class Example:
  """One answered sample, for reports."""

  index: int
  prediction: np.ndarray  # bool [h w]
  iou: float
  has_mask: bool
  codes: np.ndarray  # int32 [n]


@dataclasses.dataclass(frozen=True)
class SplitResults:
  """Metrics of a split and its first examples."""

  metrics: dict[str, float]
  examples: list[Example]


class Evaluator:
  """Compiled evaluation programs of one model, kept between calls.

  Args:
    graph: of an `ARGenSeg`.
    config: batch size and limits.
  """

  def __init__(self, graph: nnx.GraphDef, config: EvalConfig):
    self._config = config

    @jax.jit
    def answer(state, tokens, valid, images):
      model = nnx.merge(graph, state)
      return answer_batch(model, tokens, valid, images, config=config)

    @jax.jit
    def gap(state, batch):
      return grounding_gap(nnx.merge(graph, state), batch)

    self._answer = answer
    self._gap = gap

  def __call__(
    self,
    state: nnx.State,
    rows: pipeline.RowMaker,
    *,
    max_samples: int | None = None,
    num_examples: int = 0,
    on_progress: OnProgress | None = None,
  ) -> SplitResults:
    """Scores every sample once, at the pictures' own sizes.

    Args:
      state: variables of the model.
      rows: the split.
      max_samples: fewer samples than the config's.
      num_examples: how many examples to return.
      on_progress: called after each batch.
    """
    sums, examples = SegmentationSums(), []
    by_sample, pictures = [], []
    true, wrong, batches = 0.0, 0.0, 0
    limit = max_samples or self._config.max_samples or len(rows.source)
    total = min(limit, len(rows.source))
    size = self._config.batch_size
    for batch in _batches(rows, size, total):
      prompts = [
        t[p] for t, p in zip(batch.tokens, batch.is_prompt, strict=True)
      ]
      inputs = left_pad(prompts, rows.tokenizer.token_ids.pad)
      inputs = sharding.put_like((*inputs, batch.images), state)
      answers = distributed.fetch(self._answer(state, *inputs))
      if batches < 4 and np.all(batch.sample_weight > 0):
        pair = distributed.fetch(
          self._gap(state, sharding.put_like(batch, state))
        )
        true, wrong, batches = true + pair[0], wrong + pair[1], batches + 1
      for i in np.flatnonzero(batch.sample_weight):
        has_mask = bool(answers.num_masks[i])
        index = int(batch.sample_id[i])
        one, prediction = _score_answer(
          rows,
          index,
          answers.images[i, 0],
          has_mask,
          rows.tokenizer.decode(answer_tokens(answers.tokens[i])),
        )
        sums += one
        by_sample.append(one)
        pictures.append(rows.source[index].image_keys or index)
        if len(examples) < num_examples:
          examples.append(
            Example(
              index=index,
              prediction=prediction,
              iou=one.iou,
              has_mask=has_mask,
              codes=answers.codes[i, 0],
            )
          )
      if on_progress is not None:
        note = f"cIoU {sums.results()['ciou']:.3f}"
        on_progress(sums.samples, total, note)
    metrics = sums.results()
    for name, (low, high) in intervals(by_sample, pictures).items():
      if name in ("ciou", "giou"):
        metrics |= {f"{name}_low": low, f"{name}_high": high}
    if batches:
      metrics["code_loss"] = float(true / batches)
      metrics["grounding_gap"] = float((wrong - true) / batches)
    return SplitResults(metrics, examples)


def evaluate_checkpoint(
  config: RunConfig, loaded: checkpoint.Loaded, *, num_examples: int = 0
) -> dict[str, SplitResults]:
  """Scores a run's model on every split of its config, with progress.

  Args:
    config: the run.
    loaded: its checkpoint.
    num_examples: how many examples each split returns.
  """
  tokenizer = checkpoint.text_tokenizer(loaded)
  rows = rows_lib.make_rows(config.data, "mllm", loaded.config, tokenizer)
  graph, state = nnx.split(loaded.model)
  evaluator = Evaluator(graph, config.eval)
  results = {}
  for split in config.eval.splits:
    split_rows = rows_lib.of_split(rows, split)
    limit = config.eval.max_samples or len(split_rows.source)
    bar = Progress(f"evaluate {split}", min(limit, len(split_rows.source)))
    results[split] = evaluator(
      state,
      split_rows,
      num_examples=num_examples,
      on_progress=lambda done, _, note, bar=bar: bar.update(done, note),
    )
    bar.close()
  return results


def tokenizer_ceiling(
  graph: nnx.GraphDef,
  state: nnx.State,
  rows: pipeline.RowMaker,
  *,
  batch_size: int,
  max_samples: int,
) -> dict[str, float]:
  """Scores masks that were only encoded and decoded, at their own sizes.

  No model that predicts this image tokenizer's codes can do better. Samples
  without a target are left out.

  Args:
    graph, state: of a `VQVAE`.
    rows: the split.
    batch_size: masks a program takes.
    max_samples: 0 takes all.
  """

  @jax.jit
  def round_trip(state, seg_masks):
    model = nnx.merge(graph, state)
    codes = model.encode(normalize_seg_masks(seg_masks))
    decoded = model.decode(codes)
    return codes, to_uint8(decoded)

  sums = SegmentationSums()
  used: set[int] = set()
  total = min(max_samples or len(rows.source), len(rows.source))
  for batch in _batches(rows, batch_size, total):
    seg_masks = sharding.put_like(batch.seg_masks[:, 0], state)
    codes, decoded = distributed.fetch(round_trip(state, seg_masks))
    for i in np.flatnonzero(batch.mask_valid[:, 0]):
      one, _ = _score_answer(rows, int(batch.sample_id[i]), decoded[i], True)
      sums += one
      used.update(codes[i].tolist())
  metrics = sums.results()
  return {
    "ciou": metrics["ciou"],
    "giou": metrics["giou"],
    "samples": metrics["samples"],
    "codes_used": len(used),
  }


def true_seg_mask(rows: pipeline.RowMaker, index: int) -> np.ndarray:
  """bool [h w] of a record at its picture's size; empty without a target."""
  sample = rows.source[index]
  if not sample.seg_masks:
    return np.zeros(sample.load_image().shape[:2], bool)
  union = np.stack(
    [sample.load_seg_mask(i) > 0 for i in range(len(sample.seg_masks))]
  )
  return union.any(0)


def _score_answer(rows, index, decoded, has_mask, text=""):
  truth = true_seg_mask(rows, index)
  prediction = np.zeros_like(truth)
  if has_mask:
    prediction = seg_mask_at_size(
      decoded, truth.shape, pad_square=rows.config.pad_square
    )
  return score(prediction, truth, has_mask=has_mask, text=text), prediction


def _batches(rows: pipeline.RowMaker, size: int, total: int) -> Iterator[Batch]:
  """Batches of the first `total` records; later rows get weight 0."""
  seen = 0
  for batch in pipeline.eval_batches(rows, size):
    keep = np.arange(size) < total - seen
    yield batch._replace(
      sample_weight=batch.sample_weight * keep,
      mask_valid=batch.mask_valid & keep[:, None],
    )
    seen += size
    if seen >= total:
      return
