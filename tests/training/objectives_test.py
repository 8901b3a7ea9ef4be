"""What is minimized: text and codes, codes averaged as the config says."""

import dataclasses

import jax.numpy as jnp
import pytest

from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.models import losses
from argenseg_jax.training import objectives


@pytest.mark.parametrize(
  # Two of text; 12 of five codes, or 4 and 2 of the scales.
  ("code_average", "expected"),
  [("token", 2 + 12 / 5), ("scale", 2 + 3)],
)
def test_codes_are_averaged_over_all_or_over_scales(code_average, expected):
  values = tiny.get_config()
  values.data.path = "unused"
  config = dataclasses.replace(
    run_config(values).loss, code_average=code_average
  )
  sums = losses.LossSums(
    text=jnp.array(6.0),
    text_count=jnp.array(3.0),
    code=jnp.array([4.0, 8.0]),
    code_count=jnp.array([1.0, 4.0]),
  )
  assert objectives.mllm_objective(sums, config) == pytest.approx(expected)
  whole = losses.TargetCounts(jnp.array(6.0), jnp.array([2.0, 8.0]))
  half = objectives.mllm_objective(sums, config, whole)
  assert half == pytest.approx(expected / 2)
