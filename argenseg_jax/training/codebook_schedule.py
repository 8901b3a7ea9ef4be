"""What an image tokenizer needs between steps, at the times its config says."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import sharding
from argenseg_jax.config import RunConfig
from argenseg_jax.data import pipeline
from argenseg_jax.models.argenseg import normalize_seg_masks
from argenseg_jax.training import codebook
from argenseg_jax.training.state import TrainState, state_part


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
      and settings.entropy_every
      and step % settings.entropy_every == 0
    )
  )
  if not (starts or revives or counts):
    return state
  model = nnx.merge(graph, state.params, state.fixed)
  key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
  few = 32  # Masks whose vectors dead codes move to.
  count = settings.kmeans_seg_masks if starts or counts else few
  images = sample_seg_masks(rows, count, first=step * 64)
  images, key = jax.device_put((images, key), sharding.replicated(mesh))
  if starts:
    codebook.start_codebook(
      model, images, key=key, iterations=settings.kmeans_iterations
    )
  if revives:
    codebook.revive_codes(model, images[:few], state.usage, key)
    state = state._replace(usage=jnp.zeros_like(state.usage))
  if counts:
    codebook.constrain_entropy(model, images, weight=settings.entropy_weight)
  return _with_model(state, model)


def sample_seg_masks(
  rows: pipeline.RowMaker, count: int, *, first: int = 0
) -> jax.Array:
  """Masks of the records from `first` on (around the end), in [-1, 1].

  Returns:
    [b h w 3] with b = `count`, or fewer where the source is smaller.
  """
  found = []
  for index in range(first, first + len(rows.source)):
    row = rows(index % len(rows.source)).fields
    found.extend(row.seg_masks[row.mask_valid])
    if len(found) >= count:
      break
  return normalize_seg_masks(jnp.asarray(np.stack(found[:count])))


def _with_model(state: TrainState, model: nnx.Module) -> TrainState:
  variables = nnx.state(model)
  return state._replace(
    params=state_part(variables, state.params),
    fixed=state_part(variables, state.fixed),
  )
