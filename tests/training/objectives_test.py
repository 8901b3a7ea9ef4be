"""How a step's loss is put together from sums."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.config import LossConfig
from argenseg_jax.models.losses import LossSums, TargetCounts
from argenseg_jax.training.objectives import mllm_objective

SUMS = LossSums(
  text=jnp.float32(6.0),
  text_count=jnp.float32(3.0),
  code=jnp.asarray([4.0, 8.0, 32.0]),
  code_count=jnp.asarray([1.0, 4.0, 32.0]),
)
PER_TOKEN = LossConfig(
  code_average="token",
  drop_scale_inputs=0.0,
  z_loss=0.0,
  implementation="auto",
)
PER_SCALE = dataclasses.replace(PER_TOKEN, code_average="scale")


@pytest.mark.parametrize(
  ("config", "codes"),
  [(PER_TOKEN, (4 + 8 + 32) / 37), (PER_SCALE, (4 + 2 + 1) / 3)],
)
def test_codes_are_averaged_over_tokens_or_over_scales(config, codes):
  np.testing.assert_allclose(mllm_objective(SUMS, config), 2 + codes, rtol=1e-6)


@pytest.mark.parametrize("config", [PER_TOKEN, PER_SCALE])
def test_shares_of_parts_add_up(config):
  whole = TargetCounts(text=2 * SUMS.text_count, code=2 * SUMS.code_count)
  share = mllm_objective(SUMS, config, whole)
  np.testing.assert_allclose(2 * share, mllm_objective(SUMS, config), rtol=1e-6)
