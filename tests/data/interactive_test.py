"""Masks that are asked for by a point or a box."""

import dataclasses

import numpy as np
import pytest
from data import layouts

from argenseg_jax.config import DataConfig
from argenseg_jax.data import boxes, chat
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import interactive
from argenseg_jax.data.sources.registry import open_source


@pytest.fixture
def config(tmp_path):
  return DataConfig(**layouts.write("refer", tmp_path))


def test_point_lies_inside_and_box_around(config):
  ring = np.zeros((20, 30), bool)
  ring[2:18, 2:28] = True
  ring[5:15, 5:25] = False  # The middle of a ring is not in it.
  x, y = interactive.mask_point(ring)
  assert ring[int(y * 20), int(x * 30)]
  asked = dataclasses.replace(config, interactive="box")
  (words,) = open_source(asked)[0].expressions
  assert boxes.text_box(words) == pytest.approx(
    boxes.mask_box(layouts.LEFT), abs=1e-3
  )
  assert open_source(asked)[0].request == "box"
  request = chat.request_text("box", [words])
  assert f"in box {words}" in request


@pytest.mark.parametrize("how", ["drawn_point", "drawn_box"])
def test_marks_are_drawn_in_red(how, config):
  plain, marked = (
    open_source(dataclasses.replace(config, interactive=given))[0]
    for given in ("", how)
  )
  before, after = plain.load_image(), marked.load_image()
  changed = (before != after).any(-1)
  assert changed.any()
  assert (after[changed] == (255, 0, 0)).all()
  assert marked.image_keys != plain.image_keys  # Caches tell them apart.
  assert marked.request == "drawn"
  np.testing.assert_array_equal(marked.load_seg_mask(), plain.load_seg_mask())


def test_only_single_masks_can_be_asked_for(tmp_path):
  config = DataConfig(**layouts.write("jsonl", tmp_path), interactive="point")
  source = open_source(config)
  assert source[0].conversation == ()
  with pytest.raises(DataError, match="needs one image and one mask"):
    source[1]
  mixed = DataConfig(**layouts.write("meta", tmp_path), interactive="point")
  with pytest.raises(DataError, match=r"data\.interactive"):
    open_source(mixed)
