"""What an image tokenizer needs between steps, at the times its config says."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import rows as rows_lib
from argenseg_jax import sharding, tokenizer_training
from argenseg_jax.config import RunConfig
from argenseg_jax.data import pipeline
from argenseg_jax.train_state import TrainState, state_part


def maintain(
  config: RunConfig,
  graph: nnx.GraphDef,
  state: TrainState,
  step: int,
  rows: pipeline.RowMaker,
  mesh: Mesh,
) -> TrainState:
  """What an image tokenizer needs between steps: a codebook that starts on the
  data, revival of dead codes, costs that follow the codes' frequencies.

  Args:
    config: says when and how.
    graph: of the image tokenizer.
    state: after `step` steps.
    step: counted from 1.
    rows: training data.
    mesh: that `state` lives on.
  """
  settings = config.tokenizer_training
  last = config.vqvae.train.steps
  starts = settings.kmeans_iterations and step == settings.warm_start_steps
  quantized = step - settings.warm_start_steps
  revives = (
    settings.revive_every
    and quantized > 0
    and quantized % settings.revive_every == 0
    and step <= settings.revive_until
  )
  counts = settings.entropy_weight and (
    step == last
    or (
      step >= max(settings.entropy_from, 1)
      and step % settings.entropy_every == 0
    )
  )
  if not (starts or revives or counts):
    return state
  model = nnx.merge(graph, state.params, state.fixed)
  key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
  few = 32  # Masks whose vectors dead codes move to.
  count = settings.kmeans_seg_masks if starts or counts else few
  images = rows_lib.sample_seg_masks(rows, count, first=step * 64)
  images, key = jax.device_put((images, key), sharding.replicated(mesh))
  if starts:
    tokenizer_training.start_codebook(
      model, images, key=key, iterations=settings.kmeans_iterations
    )
  if revives:
    tokenizer_training.revive_codes(model, images[:few], state.usage, key)
    state = state._replace(usage=jnp.zeros_like(state.usage))
  if counts:
    tokenizer_training.constrain_entropy(
      model, images, weight=settings.entropy_weight
    )
  return _with_model(state, model)


def _with_model(state: TrainState, model: nnx.Module) -> TrainState:
  variables = nnx.state(model)
  return state._replace(
    params=state_part(variables, state.params),
    fixed=state_part(variables, state.fixed),
  )
