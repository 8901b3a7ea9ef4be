"""Measures a model on a split: masks, words, grounding; each sample once."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from argenseg_jax import checkpoint, sharding
from argenseg_jax.config import EvalConfig, RunConfig
from argenseg_jax.data import chat, pipeline
from argenseg_jax.data import examples as rows_lib
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.evaluation import records as predictions
from argenseg_jax.evaluation.grounding import CodeMeasurer
from argenseg_jax.inference.prompts import left_pad
from argenseg_jax.inference.segment import (
  Answers,
  answer_batch,
  answer_tokens,
  seg_mask_at_size,
)
from argenseg_jax.kernels import dispatch
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.runtime import distributed
from argenseg_jax.runtime.metric_writer import Progress
from argenseg_jax.types import Batch

OnProgress = Callable[[int, int, str], None]  # done, total, note
OnRecord = Callable[[dict[str, Any]], None]  # A line of predictions.jsonl.
_UNJUDGED = (
  ", which no metric here judges; look at what `argenseg generate` draws."
)
OnBatch = Callable[[], None]  # Before each batch; may raise.


@dataclasses.dataclass(frozen=True)
class SplitResults:
  """Metrics of a split, the lines of its `predictions.jsonl`, its rows."""

  metrics: dict[str, Any]
  records: list[dict[str, Any]]
  rows: pipeline.RowMaker


class Evaluator:
  """Compiled evaluation programs of one model, kept between calls.

  Each process makes, scores and writes down its own rows of a batch; the
  records are then gathered, so that all processes end with the same numbers.

  Args:
    graph: of an `ARGenSeg`.
    config: batch size and limits.
  """

  def __init__(self, graph: nnx.GraphDef, config: EvalConfig):
    self.graph = graph
    self._config = config

    @functools.partial(
      sharding.jit, static_argnames=("graph", "mesh", "config")
    )
    def answer(graph, state, inputs, mesh, config):
      found = answer_batch(nnx.merge(graph, state), **inputs, config=config)
      if mesh is None:
        return found
      rows = sharding.batch_sharding(mesh)
      return jax.lax.with_sharding_constraint(found, rows)

    self._answer = answer
    # A state, and what `_prepared` made of it; while a split is measured.
    self._ready: tuple[nnx.State, nnx.GraphDef, nnx.State] | None = None
    self._codes = CodeMeasurer(graph)

  @property
  def max_samples(self) -> int:
    """Of a split, unless a call says otherwise; 0 for all."""
    return self._config.max_samples

  def batch_size(self, state: nnx.State) -> int:
    """The config's, rounded up so that each device gets as many rows."""
    mesh = sharding.mesh_of(state)
    shards = 1 if mesh is None else sharding.num_shards(mesh)
    return -(-self._config.batch_size // shards) * shards

  def __call__(
    self,
    state: nnx.State,
    rows: pipeline.RowMaker,
    *,
    max_samples: int | None = None,
    on_progress: OnProgress | None = None,
    on_record: OnRecord | None = None,
    on_batch: OnBatch = lambda: None,
    answered: Sequence[dict[str, Any]] = (),
  ) -> SplitResults:
    """Scores every sample once, at the images' own sizes.

    Args:
      state: variables of the model.
      rows: the split, opened for evaluation.
      max_samples: fewer samples than the config's.
      on_progress: called after each batch.
      on_record: called with each record, see `records.records`.
      on_batch: called before each batch.
      answered: records of the first batches, from an interrupted call.

    Raises:
      DataError: a sample asks for an image, or has no usable true answer.
    """
    scorer, records = predictions.Scorer(), list(answered)
    for record in answered:
      scorer.add(record)
    limit = max_samples or self._config.max_samples or len(rows.source)
    total = min(limit, len(rows.source))
    size = self.batch_size(state)
    first = answered[-1]["sample"] // size + 1 if answered else 0
    done = first * size
    for batch in batches(rows, size, total, first=first):
      on_batch()
      for record in distributed.gathered(self._records(state, rows, batch)):
        try:
          value = scorer.add(record)
        except ValueError as error:
          where = rows.source[record["sample"]].where
          raise DataError(f"{where}: {error}.") from error
        record["iou" if "mask" in record else "score"] = value
        records.append(record)
        if on_record is not None:
          on_record(record)
      done = min(done + size, total)
      if on_progress is not None:
        on_progress(done, total, scorer.note)
    metrics = scorer.results()
    left_out = total - len({record["sample"] for record in records})
    if left_out:
      metrics["left_out"] = left_out
    self._ready = None
    model: ARGenSeg = nnx.merge(self.graph, state)
    metrics |= self._codes(
      state, rows, batch_size=size, total=total, sides=model.scales.sides
    )
    return SplitResults(metrics, records, rows)

  def answer(
    self, state: nnx.State, rows: pipeline.RowMaker, batch: Batch
  ) -> Answers:
    """Answers the last request of each row; arrays of the whole batch.

    Args:
      state: variables of the model.
      rows: what made the batch.
      batch: this process's rows of it.
    """
    asked = [_asked(rows, row) for row in zip(*batch[:5], strict=True)]
    prompts, later = zip(*asked, strict=True)
    tokens, valid = left_pad(
      prompts,
      rows.tokenizer.token_ids.pad,
      at_least=distributed.largest(max(map(len, prompts))),
    )
    inputs = {"tokens": tokens, "valid": valid, "images": batch.images}
    if distributed.agree_any(any(part.any() for part in later)):
      is_answer = np.zeros_like(valid)
      for row, part in zip(is_answer, later, strict=True):
        row[len(row) - len(part) :] = part
      inputs |= {"is_answer": is_answer, "past_seg_masks": batch.seg_masks}
    most = max(self._config.max_masks, rows.config.max_masks)
    return self._answer(
      *self._prepared(state),
      sharding.put_rows(inputs, state),
      mesh=sharding.mesh_of(state),
      config=dataclasses.replace(self._config, max_masks=most),
    )

  def _prepared(self, state: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """See `ARGenSeg.prepare_to_generate`; a copy of the layers on a GPU."""
    if not dispatch.copies_slices():
      return self.graph, state
    if self._ready is None or self._ready[0] is not state:
      model = nnx.merge(self.graph, state)
      model.prepare_to_generate()
      self._ready = state, *nnx.split(model)
    return self._ready[1:]

  def _records(self, state, rows, batch: Batch) -> list[dict[str, Any]]:
    """Of this process's rows."""
    answers = jax.tree.map(
      distributed.own_rows, self.answer(state, rows, batch)
    )
    found = []
    for i in np.flatnonzero(batch.sample_weight):
      index = int(batch.sample_id[i])
      sample = rows.source[index]
      if sample.target == "picture":
        raise DataError(f"{sample.where} asks for an image{_UNJUDGED}")
      if not _is_whole(rows, sample, batch.tokens[i]):
        continue
      truths = predictions.true_seg_masks(sample)
      size = truths[0].shape if truths else sample.size
      if size is None and answers.num_masks[i] and sample.images:
        size = sample.load_image().shape[:2]
      masks = []
      if size is not None:
        masks = [
          seg_mask_at_size(image, size, pad_square=rows.config.pad_square)
          for image in answers.images[i, : answers.num_masks[i]]
        ]
      found += predictions.records(
        index,
        sample,
        masks,
        truths,
        text=rows.tokenizer.decode(answer_tokens(answers.tokens[i])),
      )
    return found


def evaluate_checkpoint(
  config: RunConfig,
  loaded: checkpoint.Loaded,
  evaluator: Evaluator | None = None,
  *,
  on_batch: OnBatch = lambda: None,
) -> dict[str, SplitResults]:
  """Scores a run's model on every split of its config, with progress; not on
  those that ask for images.

  Args:
    config: the run.
    loaded: its checkpoint.
    evaluator: of this model, if there is one already.
    on_batch: called before each batch.
  """
  tokenizer = checkpoint.text_tokenizer(loaded)
  rows = rows_lib.make_rows(config.data, loaded.config, tokenizer)
  graph, state = nnx.split(loaded.model)
  evaluator = evaluator or Evaluator(graph, config.eval)
  main = distributed.is_main()
  results = {}
  for split in config.eval.splits:
    split_rows = rows_lib.of_split(rows, split)
    if rows_lib.asks_for_images(split_rows):
      if main:
        print(f"{split} asks for images{_UNJUDGED}")
      continue
    limit = config.eval.max_samples or len(split_rows.source)
    total = min(limit, len(split_rows.source))
    bar = Progress(f"evaluate {split}", total, active=main)
    results[split] = evaluator(
      state,
      split_rows,
      on_progress=lambda done, _, note, bar=bar: bar.update(done, note),
      on_batch=on_batch,
    )
    bar.close()
  return results


def headline(metrics: dict[str, Any]) -> str:
  """The metrics that fit into a line."""
  names = (
    "ciou",
    "giou",
    "psnr",
    "yes_no_accuracy",
    "vqa_soft",
    "choice_accuracy",
  )
  return " ".join(f"{n} {metrics[n]:.3f}" for n in names if n in metrics)


def _asked(rows: pipeline.RowMaker, row) -> tuple[np.ndarray, np.ndarray]:
  """The tokens before a row's last answer, and where earlier answers are:
  from the first of them on."""
  tokens, _, _, segment_ids, is_prompt = row
  used = np.count_nonzero(segment_ids)
  special = rows.tokenizer.token_ids
  turns = np.flatnonzero(tokens[:used] == special.im_start)
  header = len(rows.tokenizer.encode(chat.ASSISTANT))
  end = turns[-1] + header if turns.size else 0
  return tokens[:end], ~is_prompt[:end]


def _is_whole(rows: pipeline.RowMaker, sample: Sample, tokens) -> bool:
  """Whether a row still has its last answer, however it was cut."""
  turns = rows.conversation(sample)
  found = np.count_nonzero(tokens == rows.tokenizer.token_ids.im_start)
  system = bool(rows.config.system_message) and turns[0]["from"] != "system"
  return found == len(turns) + system


def batches(
  rows: pipeline.RowMaker, size: int, total: int, *, first: int = 0
) -> Iterator[Batch]:
  """This process's rows of batches of the first `total` records; later rows get
  weight 0."""
  share = size // jax.process_count()
  seen = first * size
  if seen >= total:
    return
  for batch in pipeline.eval_batches(
    rows,
    size,
    host_index=jax.process_index(),
    host_count=jax.process_count(),
    first=first,
  ):
    keep = np.arange(share) + share * jax.process_index() < total - seen
    yield batch._replace(
      sample_weight=batch.sample_weight * keep,
      mask_valid=batch.mask_valid & keep[:, None],
    )
    seen += size
    if seen >= total:
      return
