"""What can be trained: one record a task, all trained by `training/loop`.

A task is a model, the rows that it reads, a loss and what it logs, what happens
between its steps, and what is measured during and after training. A new task is
one more record (and its name and settings in `config.RunConfig`).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from argenseg_jax.config import ConfigError, DataConfig, RunConfig
from argenseg_jax.data import examples, pipeline
from argenseg_jax.evaluation.evaluator import Evaluator, SplitResults
from argenseg_jax.evaluation.tokenizer import tokenizer_ceiling
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import flops
from argenseg_jax.runtime import distributed
from argenseg_jax.training import codebook_schedule, objectives, rl
from argenseg_jax.training.state import TrainState

_SAMPLES = 200  # Of an evaluation during training.
_BATCH = 64  # Masks that an image tokenizer encodes at a time.

# (variables, called before each batch) -> metrics, and answers if it gives any.
Evaluate = Callable[[nnx.State, Callable[[], None]], SplitResults]


@dataclasses.dataclass(frozen=True)
class Task:
  """One thing to train.

  Attributes:
    name: of its settings in `RunConfig` and its folder in a work directory.
    model: what it trains, a key of `checkpoint.MODELS`.
    reads_text: whether it needs a text tokenizer; such a task trains the whole
      model, and its checkpoint is scored on every split.
    needs_model: whether it starts from a whole model that is trained already.
    check: raises ConfigError for settings that do not suit it.
    data: settings of the rows that it reads.
    products: matrix products of one row's forward pass, of a model with
      these rows in this run.
    constant: parts of the model that pass no gradient, trained or not.
    shared: (model, batch, config, key) -> (noise, counts). Noise is split with
      the rows of a batch, counts belong to the whole. XLA partitions it.
    score: None, or (model, part, config, noise) -> rows: what the weights say
      of the noise before they change. It becomes the noise's `old`, where a
      step updates them several times, and, of those that training started
      from, its `start`.
    loss: (model, part, config, *, noise, counts, warm) -> (share in the loss,
      sums); shares and sums of all parts add up to the whole batch's.
    metrics: (sums, usage, config, *, warm) -> (metrics with "loss", usage).
    warm_steps: how many steps at the beginning have `warm` True.
    between_steps: (config, graph, state, step, rows, mesh) -> state.
    evaluation: (graph, config, rows) -> what is measured every
      `train.eval_every` steps, on the first of `eval.splits`.
    finish: (graph, variables, rows, config) -> results of a finished run.
  """

  name: str
  model: str
  reads_text: bool
  needs_model: bool
  check: Callable[[RunConfig], None]
  data: Callable[[DataConfig], DataConfig]
  products: Callable[
    [ModelConfig, DataConfig, RunConfig], Iterable[flops.Product]
  ]
  constant: tuple[str, ...]
  shared: Callable[[Any, Any, RunConfig, Array], tuple[Any, Any]]
  score: Callable[[Any, Any, RunConfig, Any], Any] | None
  loss: Callable[..., tuple[Array, Any]]
  metrics: Callable[..., tuple[dict[str, Array], Array]]
  warm_steps: Callable[[RunConfig], int]
  between_steps: Callable[
    [RunConfig, nnx.GraphDef, TrainState, int, pipeline.RowMaker, Mesh],
    TrainState,
  ]
  evaluation: Callable[
    [nnx.GraphDef, RunConfig, pipeline.RowMaker], Evaluate | None
  ]
  finish: Callable[
    [nnx.GraphDef, nnx.State, pipeline.RowMaker, RunConfig], dict[str, Any]
  ]


def _check_codes(config: RunConfig) -> None:
  if config.data.tokenized and "vqvae" not in config.mllm.optimizer.frozen:
    raise ConfigError(
      "config keys 'data.cache_codes' and 'data.codes' need a frozen image "
      "tokenizer; add 'vqvae' to mllm.optimizer.frozen."
    )


def _decoder_products(
  model: ModelConfig, data: DataConfig, config: RunConfig
) -> Iterable[flops.Product]:
  del config
  return flops.mllm(
    model,
    data.sequence_length,
    data.max_images * data.pack,
    data.max_masks * data.pack,
    tokenized=data.tokenized,
  )


def _decoder_evaluation(
  graph: nnx.GraphDef, config: RunConfig, rows: pipeline.RowMaker
) -> Evaluate | None:
  measured = examples.of_split(rows, config.eval.splits[0])
  if examples.asks_for_images(measured):
    return None
  evaluator = Evaluator(graph, config.eval)

  def evaluate(variables, on_batch):
    return evaluator(
      variables,
      measured,
      max_samples=_SAMPLES,
      on_batch=on_batch,
    )

  return evaluate


def _tokenizer_products(
  model: ModelConfig, data: DataConfig, config: RunConfig
) -> Iterable[flops.Product]:
  del config
  return flops.image_tokenizer(
    model.vqvae, data.max_masks, decode=True, part=""
  )


def _tokenizer_evaluation(
  graph: nnx.GraphDef, config: RunConfig, rows: pipeline.RowMaker
) -> Evaluate:
  def evaluate(variables, on_batch):
    on_batch()
    measured = examples.of_split(rows, config.eval.splits[0])
    metrics = tokenizer_ceiling(
      graph,
      variables,
      measured,
      batch_size=_BATCH,
      max_samples=_SAMPLES,
    )
    return SplitResults(metrics, [], measured)

  return evaluate


def _tokenizer_results(
  graph: nnx.GraphDef,
  variables: nnx.State,
  rows: pipeline.RowMaker,
  config: RunConfig,
) -> dict[str, Any]:
  results = tokenizer_ceiling(
    graph,
    variables,
    examples.of_split(rows, config.eval.splits[0]),
    batch_size=_BATCH,
    max_samples=config.eval.max_samples,
  )
  if distributed.is_main():
    if "psnr" in results:
      score = f"PSNR {results['psnr']:.1f} dB"
    else:
      score = f"cIoU {results['ciou']:.3f}"
    print(f"image tokenizer ceiling: {score}", flush=True)
  return results


IMAGE_TOKENIZER = Task(
  name="vqvae",
  model="vqvae",
  reads_text=False,
  needs_model=False,
  check=lambda config: None,
  data=examples.masks_only,
  products=_tokenizer_products,
  constant=(),
  shared=objectives.vqvae_shared,
  score=None,
  loss=objectives.vqvae_part,
  metrics=objectives.vqvae_metrics,
  warm_steps=lambda config: config.tokenizer_training.warm_start_steps,
  between_steps=codebook_schedule.maintain,
  evaluation=_tokenizer_evaluation,
  finish=_tokenizer_results,
)

DECODER = Task(
  name="mllm",
  model="mllm",
  reads_text=True,
  needs_model=False,
  check=_check_codes,
  data=lambda data: data,
  products=_decoder_products,
  constant=("vqvae",),  # Codes pass none.
  shared=objectives.mllm_shared,
  score=None,
  loss=objectives.mllm_part,
  metrics=objectives.mllm_metrics,
  warm_steps=lambda config: 0,
  between_steps=lambda config, graph, state, step, rows, mesh: state,
  evaluation=_decoder_evaluation,
  finish=lambda graph, variables, rows, config: {
    "steps": config.mllm.train.steps
  },
)

REINFORCEMENT = dataclasses.replace(
  DECODER,
  name="rl",
  needs_model=True,
  check=rl.check,
  data=rl.data,
  products=rl.products,
  constant=("vqvae", rl.SAMPLING),
  shared=rl.shared,
  score=rl.log_probs,
  loss=rl.part,
  metrics=rl.metrics,
  finish=lambda graph, variables, rows, config: {
    "steps": config.rl.train.steps
  },
)

TASKS = {task.name: task for task in (IMAGE_TOKENIZER, DECODER, REINFORCEMENT)}
