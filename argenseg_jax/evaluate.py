"""Measures a model on a split: masks, the image tokenizer, grounding."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool

from argenseg_jax import checkpoint, distributed, predictions, sharding
from argenseg_jax import rows as rows_lib
from argenseg_jax.config import EvalConfig, RunConfig
from argenseg_jax.data import pipeline
from argenseg_jax.data.sources.sample import Sample
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

_GAP_BATCHES = 4

OnProgress = Callable[[int, int, str], None]  # done, total, note
OnRecord = Callable[[dict[str, Any]], None]  # A line of predictions.jsonl.
OnBatch = Callable[[], None]  # Before each batch; may raise.


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
    on_record: OnRecord | None = None,
    on_batch: OnBatch = lambda: None,
    answered: Sequence[dict[str, Any]] = (),
  ) -> SplitResults:
    """Scores every sample once, at the pictures' own sizes.

    Args:
      state: variables of the model.
      rows: the split.
      max_samples: fewer samples than the config's.
      num_examples: how many examples to return.
      on_progress: called after each batch.
      on_batch: called before each batch.
      on_record: called with each answered sample, see `predictions.record`.
      answered: records of the first batches, from an interrupted call.
    """
    scorer, examples = predictions.Scorer(), []
    for record in answered:
      scorer.add(record)
    limit = max_samples or self._config.max_samples or len(rows.source)
    total = min(limit, len(rows.source))
    size = self._config.batch_size
    first = answered[-1]["sample"] // size + 1 if answered else 0
    for batch in _batches(rows, size, total, first=first):
      on_batch()
      prompts = [
        t[p] for t, p in zip(batch.tokens, batch.is_prompt, strict=True)
      ]
      inputs = left_pad(prompts, rows.tokenizer.token_ids.pad)
      inputs = sharding.put_like((*inputs, batch.images), state)
      answers = distributed.fetch(self._answer(state, *inputs))
      for i in np.flatnonzero(batch.sample_weight):
        has_mask = bool(answers.num_masks[i])
        index = int(batch.sample_id[i])
        sample = rows.source[index]
        truth = true_seg_mask(sample)
        prediction = np.zeros_like(truth)
        if has_mask:
          prediction = _at_size(rows, answers.images[i, 0], truth)
        record = predictions.record(
          index,
          sample,
          prediction,
          truth,
          has_mask=has_mask,
          text=rows.tokenizer.decode(answer_tokens(answers.tokens[i])),
        )
        record["iou"] = scorer.add(record)
        if on_record is not None:
          on_record(record)
        if len(examples) < num_examples:
          examples.append(
            Example(
              index=index,
              prediction=prediction,
              iou=record["iou"],
              has_mask=has_mask,
              codes=answers.codes[i, 0],
            )
          )
      if on_progress is not None:
        note = f"cIoU {scorer.sums.results()['ciou']:.3f}"
        on_progress(scorer.sums.samples, total, note)
    metrics = scorer.results() | self._grounding(state, rows, total)
    return SplitResults(metrics, examples)

  def _grounding(self, state, rows, total: int) -> dict[str, float]:
    """Code loss and grounding gap of the first full batches."""
    found = []
    for batch in _batches(rows, self._config.batch_size, total):
      if np.any(batch.sample_weight == 0) or len(found) == _GAP_BATCHES:
        break
      pair = self._gap(state, sharding.put_like(batch, state))
      found.append(distributed.fetch(pair))
    if not found:
      return {}
    true, wrong = np.mean(found, axis=0)
    return {"code_loss": float(true), "grounding_gap": float(wrong - true)}


def evaluate_checkpoint(
  config: RunConfig,
  loaded: checkpoint.Loaded,
  *,
  num_examples: int = 0,
  on_batch: OnBatch = lambda: None,
) -> dict[str, SplitResults]:
  """Scores a run's model on every split of its config, with progress.

  Args:
    config: the run.
    loaded: its checkpoint.
    num_examples: how many examples each split returns.
    on_batch: called before each batch.
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
      on_batch=on_batch,
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
      truth = true_seg_mask(rows.source[int(batch.sample_id[i])])
      sums += score(_at_size(rows, decoded[i], truth), truth)
      used.update(codes[i].tolist())
  metrics = sums.results()
  return {
    "ciou": metrics["ciou"],
    "giou": metrics["giou"],
    "samples": metrics["samples"],
    "codes_used": len(used),
  }


def true_seg_mask(sample: Sample) -> Bool[np.ndarray, "h w"]:
  """The union of a sample's targets, at its picture's size."""
  if not sample.seg_masks:
    return np.zeros(sample.load_image().shape[:2], bool)
  union = np.stack(
    [sample.load_seg_mask(i) > 0 for i in range(len(sample.seg_masks))]
  )
  return union.any(0)


def _at_size(rows, decoded, truth: np.ndarray) -> np.ndarray:
  return seg_mask_at_size(
    decoded, truth.shape, pad_square=rows.config.pad_square
  )


def _batches(
  rows: pipeline.RowMaker, size: int, total: int, *, first: int = 0
) -> Iterator[Batch]:
  """Batches of the first `total` records; later rows get weight 0."""
  seen = first * size
  if seen >= total:
    return
  for batch in pipeline.eval_batches(rows, size, first=first):
    keep = np.arange(size) < total - seen
    yield batch._replace(
      sample_weight=batch.sample_weight * keep,
      mask_valid=batch.mask_valid & keep[:, None],
    )
    seen += size
    if seen >= total:
      return
