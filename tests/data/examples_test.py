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
    ({"jpeg_quality": -1}, "'data.jpeg_quality' is -1; use 0 to 100"),
    ({"jpeg_quality": 101}, "'data.jpeg_quality' is 101; use 0 to 100"),
    ({"jpeg_quality": 75, "cache": True}, "set 'data.cache' to False"),
    ({"mask_intermediate_side": 0}, "'data.mask_intermediate_side' is 0"),
    ({"mask_channels": 2}, "'data.mask_channels' is 2; use 1 or 3"),
    ({"max_bad_share": 1.5}, "'data.max_bad_share' is 1.5; use 0 to 1"),
    ({"max_bad_share": float("nan")}, "'data.max_bad_share' is nan"),
    ({"max_masks": -1}, "'data.max_masks' is -1; use 0 or more"),
    ({"pack": 0}, "'data.pack' is 0; use 1 or more"),
    ({"workers": -1}, "'data.workers' is -1; use 0 or more"),
    ({"image_side": 32}, "'data.image_side' is 32, but .* takes 16"),
    ({"mask_side": 32}, "'data.mask_side' is 32, but .* takes 16"),
  ],
)
def test_settings_out_of_range_are_named(changes, message):
  data = DataConfig("nowhere", image_side=16, mask_side=16)
  data = dataclasses.replace(data, **changes)
  with pytest.raises(ConfigError, match=message):
    make_rows(data, tiny_model.config(), TextTokenizer())
