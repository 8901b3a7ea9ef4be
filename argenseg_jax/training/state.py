"""What a training run holds on its devices: described, made or restored."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from argenseg_jax import sharding
from argenseg_jax.checkpoint import Checkpoints
from argenseg_jax.config import LoRAConfig, StageConfig
from argenseg_jax.models import lora
from argenseg_jax.training.optimizer import (
  init_moments,
  make_optimizer,
  trainable_filter,
)


class TrainState(NamedTuple):
  """What a step changes, and `fixed`: variables that do not train."""

  step: Array  # int32 []
  params: nnx.State
  fixed: nnx.State
  optimizer: Any
  usage: Array  # int32 [codes]: since the last revival (image tokenizer only).
  # Exponential average of params in float32, or None. It is what others get to
  # see; in bfloat16 it would stand still.
  average: nnx.State | None = None
  # Params as they were at the start, in the compute dtype, or None.
  start: nnx.State | None = None

  @property
  def variables(self) -> nnx.State:
    """The whole model, averaged if an average is kept."""
    params = self.params if self.average is None else self.average
    return nnx.merge_state(params, self.fixed)

  @property
  def counters(self) -> tuple:
    """What a checkpoint holds beside the model: with an average, which stands
    in the model's place, the raw parameters too; and a start that is kept."""
    raw = None if self.average is None else self.params
    kept = () if self.start is None else (self.start,)
    return self.step, self.optimizer, self.usage, raw, *kept


class Described(NamedTuple):
  """A run's state as shapes, dtypes and shardings, and what works on it."""

  graph: nnx.GraphDef
  optimizer: optax.GradientTransformation
  state: TrainState
  # Checkpoints hold what trains, not the frozen base that is read elsewhere.
  adapters: bool = False

  def saved(self, state: TrainState) -> nnx.State:
    """The variables that a checkpoint of `state` holds."""
    if self.adapters:
      return state.params if state.average is None else state.average
    return state.variables

  @property
  def shardings(self) -> TrainState:
    """A `NamedSharding` for each array."""
    return jax.tree.map(lambda x: x.sharding, self.state)

  def begin(self, variables: nnx.State) -> TrainState:
    """The state before the first step, of a whole model's variables."""
    params = state_part(variables, self.state.params)
    moments = jax.jit(
      lambda params: init_moments(self.optimizer, params),
      out_shardings=self.shardings.optimizer,
    )(params)
    average = None
    if self.state.average is not None:
      # A copy: the step gives its inputs' memory away.
      average = jax.tree.map(_float32_copy, params)
    start = None
    if self.state.start is not None:
      start = jax.tree.map(
        lambda p, kept: jnp.array(p, kept.dtype, copy=True),
        params,
        self.state.start,
      )
    state = TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      fixed=state_part(variables, self.state.fixed),
      optimizer=moments,
      usage=jnp.zeros(self.state.usage.shape, jnp.int32),
      average=average,
      start=start,
    )
    return jax.device_put(state, self.shardings)

  def restore(
    self,
    checkpoints: Checkpoints,
    step: int,
    base: nnx.State | None = None,
  ) -> tuple[TrainState, dict[str, Any]]:
    """A saved state, and the data's beside it.

    Args:
      checkpoints: of the run.
      step: one of them.
      base: variables that the checkpoint lacks, if it holds adapters.

    Raises:
      checkpoint.CheckpointError: as `Checkpoints.restore`.
    """
    variables, counters, meta = checkpoints.restore(
      step, self.saved(self.state), self.state.counters
    )
    params, average = state_part(variables, self.state.params), None
    if self.state.average is not None:
      params, average = counters[3], params
    state = TrainState(
      step=counters[0],
      params=params,
      fixed=state_part(variables if base is None else base, self.state.fixed),
      optimizer=counters[1],
      usage=counters[2],
      average=average,
      start=None if self.state.start is None else counters[4],
    )
    return state, meta["data"]


def describe(
  graph: nnx.GraphDef,
  variables: nnx.State,
  stage: StageConfig,
  *,
  num_codes: int,
  mesh: sharding.AnyMesh,
  adapters: LoRAConfig | None = None,
) -> Described:
  """The state of a run that trains a model.

  Args:
    graph: of the model, with `variables` (abstract ones suffice).
    variables: of the model.
    stage: says what trains, and how.
    num_codes: of its image tokenizer.
    mesh: from `sharding.make_mesh`.
    adapters: of the model; they train, with what they name beside them.

  Raises:
    config.ConfigError: the mesh or the optimizer does not suit the model.
  """
  if adapters is None:
    trains = trainable_filter(stage.optimizer, variables)
  else:
    trains = lora.trainable_filter(adapters, variables)
  graph, params, fixed = nnx.split(nnx.merge(graph, variables), trains, ...)
  optimizer = make_optimizer(stage.optimizer, stage.num_updates, params)
  start = None
  if stage.keeps_start:
    dtype = jnp.dtype(stage.train.compute_dtype)
    start = jax.eval_shape(
      lambda p: jax.tree.map(lambda x: x.astype(dtype), p), params
    )
  state = TrainState(
    step=jax.eval_shape(lambda: jnp.zeros((), jnp.int32)),
    params=params,
    fixed=fixed,
    optimizer=jax.eval_shape(lambda p: init_moments(optimizer, p), params),
    usage=jax.eval_shape(lambda: jnp.zeros(num_codes, jnp.int32)),
    average=(
      jax.eval_shape(lambda p: jax.tree.map(_float32_copy, p), params)
      if stage.optimizer.ema_decay
      else None
    ),
    start=start,
  )
  state = sharding.placed(state, sharding.state_shardings(state, mesh))
  return Described(graph, optimizer, state, adapters is not None)


def _float32_copy(x: Array) -> Array:
  return jnp.array(x, jnp.float32, copy=True)


def state_part(variables: nnx.State, part: nnx.State) -> nnx.State:
  """The variables that stand at the paths of `part`."""
  flat = dict(nnx.to_flat_state(variables))
  return nnx.from_flat_state(
    [(path, flat[path]) for path, _ in nnx.to_flat_state(part)]
  )
