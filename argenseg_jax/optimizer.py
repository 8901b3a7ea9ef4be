"""AdamW, schedules, clipping and freezing, built from `OptimizerConfig`."""

import jax
import optax
from flax import nnx

from argenseg_jax.config import ConfigError, OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then the configured descent."""
  peak = config.learning_rate
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
  """Clip the global norm, then AdamW with decay on matrices only."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule(config, steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=decay_mask(params),
    ),
  )


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
