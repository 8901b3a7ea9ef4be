"""Optimizers, schedules, clipping, freezing, built from `OptimizerConfig`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from argenseg_jax.config import ConfigError, OptimizerConfig
from argenseg_jax.training.factored import scale_by_factored_moments


def schedule(
  config: OptimizerConfig, steps: int, *, peak: float | None = None
) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then the configured descent.

  Args:
    config: of the optimizer.
    steps: of the whole run.
    peak: another highest rate than the config's.
  """
  peak = config.learning_rate if peak is None else peak
  warmup = min(config.warmup_steps, steps)
  rest = max(steps - warmup, 1)
  match config.schedule:
    case "cosine":
      descent = optax.cosine_decay_schedule(peak, rest, config.end_fraction)
    case "linear":
      descent = optax.linear_schedule(peak, peak * config.end_fraction, rest)
    case "constant":
      descent = optax.constant_schedule(peak)
  if not warmup:
    return descent
  rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules((rise, descent), (warmup,))


def decay_mask(params: nnx.State):
  """True for parameters that weight decay applies to.

  Norms, biases and other vectors do not decay; the layer axis of stacked
  parameters does not count as a dimension.
  """

  def decays(variable):
    axes = [a for a in variable.get_metadata("axes") if a != "layers"]
    return variable.replace(len(axes) > 1)

  return jax.tree.map(
    decays, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )


def make_optimizer(
  config: OptimizerConfig, steps: int, params: nnx.State
) -> optax.GradientTransformation:
  """Clips the global norm, then updates as `config.name` says.

  Args:
    config: of the optimizer.
    steps: of the whole run.
    params: that train; abstract ones suffice.
  """
  clip = optax.identity()  # Keeps the places of states in checkpoints.
  if config.clip_norm:
    clip = optax.clip_by_global_norm(config.clip_norm)
  return optax.chain(
    clip,
    *OPTIMIZERS[config.name](config, steps, params),
  )


def _adamw(
  config: OptimizerConfig, steps: int, mask: Any
) -> optax.GradientTransformation:
  """AdamW that decays what `mask` says, or a function of parameters that
  returns such a mask."""
  return optax.adamw(
    schedule(config, steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=mask,
  )


def _adamw_on_all(
  config: OptimizerConfig, steps: int, params: nnx.State
) -> tuple[optax.GradientTransformation, ...]:
  """AdamW with decay on matrices only."""
  return (_adamw(config, steps, decay_mask(params)),)


def _muon_on_matrices(
  config: OptimizerConfig, steps: int, params: nnx.State
) -> tuple[optax.GradientTransformation, ...]:
  """Muon for hidden matrices, AdamW for the rest.

  Muon's steps are orthogonal, scaled to the size that AdamW's would have.
  """
  muon = optax.contrib.muon(
    schedule(config, steps, peak=config.muon_learning_rate),
    weight_decay=config.weight_decay,
    muon_weight_dimension_numbers=_last_two_axes,
    consistent_rms=0.2,
  )
  hidden = hidden_matrices(params)
  others = jax.tree.map(lambda is_hidden: not is_hidden, hidden)
  return (
    optax.masked(muon, hidden),
    optax.masked(_adamw(config, steps, decay_mask), others),
  )


def _adafactor_on_all(
  config: OptimizerConfig, steps: int, params: nnx.State
) -> tuple[optax.GradientTransformation, ...]:
  """AdamW in a quarter of its bytes: factored second moments, updates of root
  mean square 1 at most, and their average in bfloat16 (arXiv 2106.04560)."""
  return (
    scale_by_factored_moments(config.b2, config.eps),
    optax.clip_by_block_rms(1.0),
    optax.ema(config.b1, accumulator_dtype=jnp.bfloat16),
    optax.add_decayed_weights(config.weight_decay, decay_mask(params)),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )


# By `OptimizerConfig.name`: (config, steps of the run, parameters) -> what
# follows the clipping of gradients, one after the other.
OPTIMIZERS: dict[
  str,
  Callable[
    [OptimizerConfig, int, nnx.State],
    tuple[optax.GradientTransformation, ...],
  ],
] = {
  "adamw": _adamw_on_all,
  "muon": _muon_on_matrices,
  "adafactor": _adafactor_on_all,
}


def hidden_matrices(params: nnx.State):
  """True for matrices between hidden widths: no tables of words, no kernels of
  convolutions; the layer axis of stacked parameters does not count."""

  def is_hidden(variable):
    axes = [a for a in variable.get_metadata("axes") if a != "layers"]
    named = all(a not in (None, "vocab") for a in axes)
    return variable.replace(len(axes) == 2 and named)

  return jax.tree.map(
    is_hidden, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )


def _last_two_axes(params):
  """Muon's matrices are the last two axes; layers are independent."""

  def dimensions(x):
    return optax.contrib.MuonDimensionNumbers((x.ndim - 2,), (x.ndim - 1,))

  return jax.tree.map(dimensions, params)


def apply_updates(
  params: nnx.State, updates: optax.Updates, key: Array
) -> nnx.State:
  """Parameters after an update, in their own dtypes.

  bfloat16 keeps eight bits of a weight; an update below half of the last one
  would be lost in every step. So the sum, taken in float32, is rounded up or
  down at random, and is right on average.

  Args:
    params: in float32 or bfloat16.
    updates: to add, in float32.
    key: of the step.
  """
  leaves, tree = jax.tree.flatten(params)
  changes = tree.flatten_up_to(updates)
  moved = []
  for number, (leaf, change) in enumerate(zip(leaves, changes, strict=True)):
    value = leaf.astype(jnp.float32) + change.astype(jnp.float32)
    if leaf.dtype == jnp.bfloat16:
      value = round_at_random(value, jax.random.fold_in(key, number))
    moved.append(value.astype(leaf.dtype))
  return jax.tree.unflatten(tree, moved)


def round_at_random(x: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
  """One of the two bfloat16 neighbors of each float32 number; the nearer one is
  the likelier, so that the mean over keys is the number itself."""
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  below = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = (bits + below) & jnp.uint32(0xFFFF0000)
  rounded = lax.bitcast_convert_type(rounded, jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def init_moments(
  optimizer: optax.GradientTransformation, params: nnx.State
) -> Any:
  """The optimizer's state in float32, whatever the dtype of the parameters.

  A bfloat16 second moment would stand still: one step changes it by less than
  its last digit.
  """
  return optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))


def trainable_filter(config: OptimizerConfig, state: nnx.State):
  """An NNX filter for the parameters that train.

  Raises:
    config.ConfigError: a frozen prefix that matches no parameter.
  """
  frozen = [tuple(prefix.split(".")) for prefix in config.frozen]
  paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(state)]
  for prefix in frozen:
    if not any(path[: len(prefix)] == prefix for path in paths):
      raise ConfigError(
        f"config key 'optimizer.frozen' names {'.'.join(prefix)!r}, which is "
        "no part of the model."
      )

  def trains(path, value):
    path = tuple(map(str, path))
    is_param = isinstance(value, nnx.Param)
    return is_param and not any(path[: len(f)] == f for f in frozen)

  return trains
