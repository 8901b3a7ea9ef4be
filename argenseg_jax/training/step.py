"""One optimization step of any task, as pure functions for `jax.jit`.

Loss and gradient of a batch are sums over its parts, each divided by counts of
the whole batch. Parts are what one device holds (`shard_map` over the batch
axes) and, within it, what one turn of gradient accumulation takes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from argenseg_jax import sharding
from argenseg_jax.config import ConfigError, RunConfig, TrainConfig
from argenseg_jax.models import int8
from argenseg_jax.runtime.nan_guard import Verdict
from argenseg_jax.training.optimizer import apply_updates
from argenseg_jax.training.state import TrainState
from argenseg_jax.training.tasks import Task
from argenseg_jax.types import Batch

# (params, fixed, batch, noise, counts) -> (gradients, sums, whether the part
# that each row belongs to was finite).
Gradients = Callable[
  [nnx.State, nnx.State, Batch, Any, Any], tuple[Any, Any, Bool[Array, "b"]]
]
# (state, batch) -> (state, metrics).
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
_ROUNDING = 3  # Folded into a step's key; `draw_noise` takes what is below.


def make_train_step(
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  config: RunConfig,
  task: Task,
  *,
  mesh: Mesh,
  warm: bool = False,
) -> Step:
  """A function (state, batch) -> (state, metrics), to be jitted.

  Where the loss, the gradient's norm or a parameter after the update is not
  finite, only the step count changes; the metric "verdict" says so.

  Args:
    graph: of the module that `task` trains.
    optimizer: from `optimizer.make_optimizer`.
    config: of the run.
    task: says what is minimized and logged.
    mesh: that state and batch live on.
    warm: see `Task.warm_steps`.
  """
  stage = config.stage(task.name)
  updates = stage.num_updates // stage.train.steps
  require_equal_parts(stage.train, mesh)
  gradients = _in_turns(
    functools.partial(_part_loss, graph, config, task, warm), stage.train
  )
  if sharding.num_shards(mesh) > 1:  # XLA does `tensor` by itself.
    gradients = _over_mesh(gradients, mesh)

  def step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    model = nnx.merge(graph, state.params, state.fixed)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      noise, counts = task.shared(model, batch, config, key)
    if task.score is not None:
      score = _scorer(functools.partial(_score, graph, config, task), mesh)
      noise = _scored(score, state, batch, noise, old=updates > 1)

    def update(state: TrainState, key: Array):
      grads, sums, rows_finite = gradients(
        state.params, state.fixed, batch, noise, counts
      )
      metrics, usage = task.metrics(sums, state.usage, config, warm=warm)
      grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
      new = _updated(
        state, grads, usage, optimizer, stage.optimizer.ema_decay, key
      )
      metrics["grad_norm"] = optax.tree.norm(grads)
      return new, (metrics, rows_finite)

    key = jax.random.fold_in(key, _ROUNDING)
    if updates == 1:
      new, (metrics, rows_finite) = update(state, key)
    else:
      new, of_each = lax.scan(update, state, jax.random.split(key, updates))
      metrics = jax.tree.map(lambda x: jnp.mean(x, 0), of_each[0])
      rows_finite = jnp.all(of_each[1], 0)
    given = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    finite = given & _all_finite(new.params)
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    # A part that gathers can spoil the gradients of all others.
    blamed = ~rows_finite | (~given & jnp.all(rows_finite))
    verdict = Verdict(
      skipped=~finite,
      update_only=given & ~finite,
      records=jnp.where(blamed, batch.sample_id, -1),
    )
    verdict = lax.with_sharding_constraint(verdict, sharding.replicated(mesh))
    return (
      new._replace(step=state.step + 1),
      {**metrics, "verdict": verdict},
    )

  return step


def require_equal_parts(train: TrainConfig, mesh: sharding.AnyMesh) -> None:
  """Checks that a batch can be split over devices and turns.

  Raises:
    ConfigError: the batch does not divide into them.
  """
  parts = train.accumulate_steps * sharding.num_shards(mesh)
  if train.global_batch_size % parts:
    raise ConfigError(
      f"global_batch_size {train.global_batch_size} does not divide into "
      f"{parts} parts (accumulate_steps {train.accumulate_steps} times mesh "
      "axes slice, data and fsdp)."
    )


def _part_loss(
  graph: nnx.GraphDef,
  config: RunConfig,
  task: Task,
  warm: bool,
  params: nnx.State,
  fixed: nnx.State,
  batch: Batch,
  noise: Any,
  counts: Any,
) -> tuple[Array, Any]:
  """A part's share in the loss, and what to sum over parts."""
  model = nnx.merge(graph, *_whole_tables((params, fixed)))
  return task.loss(model, batch, config, noise=noise, counts=counts, warm=warm)


def _score(
  graph: nnx.GraphDef,
  config: RunConfig,
  task: Task,
  params: nnx.State,
  fixed: nnx.State,
  batch: Batch,
  noise: Any,
) -> Any:
  """`Task.score` of a part, in the turns of gradient accumulation."""
  scored = task.score
  assert scored is not None
  train = config.stage(task.name).train
  states = _cast_split((params, fixed), train.compute_dtype)

  def score(turn):
    model = nnx.merge(graph, *_whole_tables(states))
    return scored(model, turn[0], config, turn[1])

  if train.accumulate_steps == 1:
    return score((batch, noise))
  turns = functools.partial(_split_rows, train.accumulate_steps)
  found = lax.map(score, jax.tree.map(turns, (batch, noise)))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _scorer(score: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """The same of a whole batch, each device working on its own rows."""
  if sharding.num_shards(mesh) == 1:
    return score
  rows = PartitionSpec(sharding.BATCH_AXES)

  def whole(params, fixed, batch, noise):
    return jax.shard_map(
      score,
      mesh=mesh,
      in_specs=(*map(sharding.local_specs, (params, fixed)), rows, rows),
      out_specs=rows,
      axis_names=_manual_axes(mesh),
      check_vma=False,
    )(params, fixed, batch, noise)

  return whole


def _scored(
  score: Callable[..., Any],
  state: TrainState,
  batch: Batch,
  noise: Any,
  *,
  old: bool,
) -> Any:
  """The noise with what the weights, and those of the start, say of it."""
  seen = noise
  if old:
    noise = noise._replace(old=score(state.params, state.fixed, batch, seen))
  if state.start is not None:
    noise = noise._replace(start=score(state.start, state.fixed, batch, seen))
  return noise


def _in_turns(
  part_loss: Callable[..., tuple[Array, Any]], train: TrainConfig
) -> Gradients:
  """Gradients of all parts that this code sees, one after the other."""
  accumulate = train.accumulate_steps

  def grad(params, fixed, batch, noise, counts):
    (loss, sums), grads = jax.value_and_grad(part_loss, has_aux=True)(
      params, fixed, batch, noise, counts
    )
    return grads, sums, jnp.isfinite(loss) & _all_finite(_own(grads))

  def gradients(params, fixed, batch, noise, counts):
    params, fixed = _cast_split((params, fixed), train.compute_dtype)
    b = batch.sample_id.shape[0]
    if accumulate == 1:
      grads, sums, finite = grad(params, fixed, batch, noise, counts)
      return grads, sums, jnp.full((b,), finite)
    turns = jax.tree.map(
      functools.partial(_split_rows, accumulate), (batch, noise)
    )

    def add(total, turn):
      rows, drawn = turn
      grads, sums, finite = grad(params, fixed, rows, drawn, counts)
      total = jax.tree.map(
        lambda t, n: t + n.astype(t.dtype), total, (grads, sums)
      )
      return total, finite

    first = jax.tree.map(lambda x: x[0], turns)
    *shapes, _ = jax.eval_shape(grad, params, fixed, *first, counts)
    zeros = jax.tree.map(_zeros, tuple(shapes))
    (grads, sums), finite = lax.scan(add, zeros, turns)
    return grads, sums, jnp.repeat(finite, b // accumulate)

  return gradients


def _split_rows(turns: int, x: Array) -> Array:
  """Rows in equal parts, one a turn; an array may be empty but for its rows."""
  return x.reshape(turns, x.shape[0] // turns, *x.shape[1:])


def _zeros(x: jax.ShapeDtypeStruct) -> Array:
  """What a sum over turns starts at: in float32, if it is of numbers."""
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  return jnp.zeros(x.shape, jnp.float32 if floating else x.dtype)


def _over_mesh(gradients: Gradients, mesh: Mesh) -> Gradients:
  """The same of a whole batch, each device working on its own rows."""
  rows = PartitionSpec(sharding.BATCH_AXES)

  def local(params, fixed, batch, noise, counts):
    grads, sums, finite = gradients(params, fixed, batch, noise, counts)
    sums = jax.tree.map(lambda x: lax.psum(x, sharding.BATCH_AXES), sums)
    return sharding.sum_gradients(grads), sums, finite

  def whole(params, fixed, batch, noise, counts):
    specs = sharding.local_specs(params)
    fixed_specs = sharding.local_specs(fixed)
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(specs, fixed_specs, rows, rows, PartitionSpec()),
      out_specs=(specs, PartitionSpec(), rows),
      axis_names=_manual_axes(mesh),
      check_vma=False,
    )(params, fixed, batch, noise, counts)

  return whole


def _manual_axes(mesh: Mesh) -> set[str]:
  """All but `tensor`, where XLA splits heads and MLPs by itself."""
  return set(mesh.axis_names) - (
    {"tensor"} if mesh.shape["tensor"] > 1 else set()
  )


@jax.named_scope("optimizer")
def _updated(
  state: TrainState,
  grads: nnx.State,
  usage: Int[Array, "codes"],
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  key: Array,
) -> TrainState:
  """The state after an update, its step not counted yet; `key` rounds it."""
  updates, moments = optimizer.update(grads, state.optimizer, state.params)
  params = apply_updates(state.params, updates, key)
  average = state.average
  if average is not None:
    average = update_average(average, params, state.step, ema_decay)
  return state._replace(
    params=params, optimizer=moments, usage=usage, average=average
  )


def update_average(
  average: nnx.State, params: nnx.State, step: Array, decay: float
) -> nnx.State:
  """Moves the average towards `params`, faster at the beginning."""
  keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(
    lambda a, p: (a + (1 - keep) * (p.astype(a.dtype) - a)).astype(a.dtype),
    average,
    params,
  )


def _all_finite(tree: Any) -> Bool[Array, ""]:
  odd = [jnp.any(~jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  # The root keeps XLA from fusing the whole sum into each user of the result:
  # of 137 parameters, a CPU compiled 57,274 `and`s.
  return jnp.sqrt(sum(x.astype(jnp.float32) for x in odd)) == 0


def _own(grads: Any) -> list[Array]:
  """Gradients that no other device has been added to yet."""
  leaves = jax.tree.leaves(grads, is_leaf=lambda x: isinstance(x, nnx.Variable))
  if sharding.gathers():
    leaves = [leaf for leaf in leaves if not sharding.is_split(leaf)]
  return jax.tree.leaves(leaves)


def _cast_split(state: Any, dtype: str) -> Any:
  """Shards that will be gathered, in the dtype that they are used in: half the
  traffic in bfloat16, for parameters and gradients alike."""
  if not sharding.gathers():
    return state

  def cast(variable):
    floating = jnp.issubdtype(variable.dtype, jnp.floating)
    if isinstance(variable, int8.Scale) or not floating:
      return variable  # Eight-bit weights are half of bfloat16 already.
    if not sharding.is_split(variable):
      return variable
    return variable.replace(variable[...].astype(dtype))

  return jax.tree.map(
    cast, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )


def _whole_tables(states: Any) -> Any:
  """Gathers what belongs to no stack of layers; `layer_scan` does those."""

  def whole(variable):
    if "layers" in variable.get_metadata().get("axes", ()):
      return variable
    return sharding.gathered(variable)

  return jax.tree.map(
    whole, states, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
