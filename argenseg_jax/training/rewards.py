"""What a sampled answer is worth: a table of functions, and users' own.

Each takes `Answered` and gives a number in 0..1 for each answer. They run on
the device, inside the compiled step: jax only, fixed shapes.
"""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from argenseg_jax.config import ConfigError, RLConfig

# Width of a mask's boundary as a share of its image's diagonal (arXiv
# 2103.16562).
_BOUNDARY = 0.02


class Answered(NamedTuple):
  """Sampled answers beside what is right, r of them."""

  seg_masks: Array  # bool [r h w] at data.mask_side; empty without a mask.
  truths: Array  # bool [r h w]; empty where nothing is to be segmented.
  has_mask: Array  # bool [r]: the answer holds a mask.
  is_due: Array  # bool [r]: it should.
  ended: Array  # bool [r]: in a mask or `<|im_end|>` within eval.max_text.
  tokens: Array  # int32 [r text], see `generate.Generated`.


Reward = Callable[[Answered], Float[Array, "r"]]


def iou(answered: Answered) -> Float[Array, "r"]:
  """IoU with the true mask; 1 for nothing where nothing is there, 0 for an
  answer without the mask that is due."""
  return _iou(answered.seg_masks, answered.truths)


def boundary(answered: Answered) -> Float[Array, "r"]:
  """The same of the pixels near the contours (boundary IoU)."""
  return _iou(_band(answered.seg_masks), _band(answered.truths))


def format_reward(answered: Answered) -> Float[Array, "r"]:
  """1 for an answer that ends, with a mask just where one is due."""
  return (answered.ended & (answered.has_mask == answered.is_due)).astype(
    jnp.float32
  )


REWARDS: dict[str, Reward] = {
  "iou": iou,
  "boundary": boundary,
  "format": format_reward,
}


def chosen(config: RLConfig) -> dict[str, tuple[Reward, float]]:
  """The reward functions of a run by name, with their weights.

  Raises:
    ConfigError: a name that is nowhere, or as many weights as no reward has.
  """
  names, weights = config.rewards, config.reward_weights
  if not names or len(set(names)) < len(names):
    raise ConfigError(
      f"config key 'rl.rewards' is {names!r}; name each reward once."
    )
  if weights and len(weights) != len(names):
    raise ConfigError(
      f"config key 'rl.reward_weights' holds {len(weights)} numbers for "
      f"{len(names)} of 'rl.rewards'; give one for each, or none."
    )
  pairs = zip(names, weights or (1.0,) * len(names), strict=True)
  return {name: (_named(name), weight) for name, weight in pairs}


def _named(name: str) -> Reward:
  if name in REWARDS:
    return REWARDS[name]
  module, colon, function = name.partition(":")
  if not colon:
    raise ConfigError(
      f"config key 'rl.rewards' names {name!r}; use {', '.join(REWARDS)}, or "
      "a function of your own as module:function."
    )
  try:
    found: Reward = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(
      f"config key 'rl.rewards' names {name!r}, which cannot be imported "
      f"({error}); put its module on PYTHONPATH."
    ) from error
  if not callable(found):
    raise ConfigError(f"config key 'rl.rewards' names {name!r}, no function.")
  return found


def _iou(
  masks: Bool[Array, "r h w"], truths: Bool[Array, "r h w"]
) -> Float[Array, "r"]:
  """1 where both are empty."""
  shared = jnp.sum(masks & truths, (1, 2), dtype=jnp.float32)
  either = jnp.sum(masks | truths, (1, 2), dtype=jnp.float32)
  return jnp.where(either > 0, shared / jnp.maximum(either, 1.0), 1.0)


def _band(masks: Bool[Array, "r h w"]) -> Bool[Array, "r h w"]:
  """The pixels of a mask that lie near its contour or the image's edge."""
  reach = max(round(_BOUNDARY * math.hypot(*masks.shape[1:])), 1)
  side = 2 * reach + 1
  outside = jnp.pad(~masks, ((0, 0), *[(reach, reach)] * 2), mode="constant")
  outside = outside | jnp.pad(
    jnp.zeros_like(masks),
    ((0, 0), *[(reach, reach)] * 2),
    constant_values=True,
  )
  near = jax.lax.reduce_window(
    outside, False, jax.lax.bitwise_or, (1, side, side), (1, 1, 1), "VALID"
  )
  return masks & near
