"""What answers are worth."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from argenseg_jax.config_parsing import replace, run_config
from argenseg_jax.configs import tiny
from argenseg_jax.training import rewards, rollouts


def answered():
  """A half right mask, none where one is due, none where none is due, one where
  none is due, a right one."""
  masks = np.zeros((5, 12, 12), bool)
  truths = np.zeros((5, 12, 12), bool)
  truths[[0, 1, 4], 2:10, 2:10] = True
  masks[0, 2:10, 2:6] = True
  masks[3, :3, :3] = True
  masks[4] = truths[4]
  return rewards.Answered(
    seg_masks=jnp.asarray(masks),
    truths=jnp.asarray(truths),
    has_mask=jnp.array([True, False, False, True, True]),
    is_due=jnp.array([True, True, False, False, True]),
    ended=jnp.array([True, True, False, True, True]),
    tokens=jnp.zeros((5, 2), jnp.int32),
  )


@pytest.mark.parametrize(
  ("name", "worth"),
  [
    ("iou", [0.5, 0, 1, 0, 1]),
    # Bands of one pixel: 20 and 28 of them, 14 in common.
    ("boundary", [14 / 34, 0, 1, 0, 1]),
    ("format", [1, 0, 0, 0, 1]),
  ],
)
def test_rewards(name, worth):
  found = rewards.REWARDS[name](answered())
  np.testing.assert_allclose(found, worth, rtol=1e-6)


def test_a_function_of_a_user_is_found():
  values = tiny.get_config()
  values.data.path = "unused"
  name = "argenseg_jax.training.rewards:boundary"
  changes = {"rl.rewards": ["iou", name], "rl.reward_weights": [1.0, 0.5]}
  config = replace(run_config(values), changes)
  assert rewards.chosen(config.rl) == {
    "iou": (rewards.iou, 1.0),
    name: (rewards.boundary, 0.5),
  }


def test_masks_are_binary_as_evaluation_has_them():
  pixels = np.random.default_rng(0).integers(100, 156, (1, 40, 40, 3), np.uint8)
  gray = np.asarray(Image.fromarray(pixels[0]).convert("L"))
  found = rollouts.binary_masks(jnp.asarray(pixels))[0]
  np.testing.assert_array_equal(found, gray > 127)
