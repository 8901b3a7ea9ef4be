"""Data settings that no run can have are named before anything is read."""

import dataclasses

import pytest
import tiny_model

from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data.examples import make_rows
from argenseg_jax.data.text import TextTokenizer


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"jpeg_quality": 75, "cache": True}, "set 'data.cache' to False"),
    ({"image_side": 32}, "'data.image_side' is 32, but .* takes 16"),
    ({"mask_side": 32}, "'data.mask_side' is 32, but .* takes 16"),
  ],
)
def test_settings_that_no_run_can_have_are_named(changes, message):
  data = DataConfig("nowhere", image_side=16, mask_side=16)
  data = dataclasses.replace(data, **changes)
  with pytest.raises(ConfigError, match=message):
    make_rows(data, tiny_model.config(), TextTokenizer())
