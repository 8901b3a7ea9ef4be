"""Folders of images without requests, and images as an encoder's targets."""

import numpy as np
import pytest
from data import layouts

from argenseg_jax.config import DataConfig
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.sources.image_folder import ImageFolderSource
from argenseg_jax.data.sources.registry import open_source


def rows_of(**changes) -> RowMaker:
  """Rows without text, as an image tokenizer takes them."""
  config = DataConfig(
    **{
      "sequence_length": 0,
      "max_images": 0,
      "mask_side": 16,
      "mask_intermediate_side": None,
      **changes,
    }
  )
  source = open_source(config)
  return RowMaker(source, config, tokenizer=None, image_tokens=4, num_codes=21)


@pytest.fixture
def folder(tmp_path):
  layouts.mask(tmp_path / "b.png", layouts.LEFT)
  layouts.mask(tmp_path / "deep" / "a.PNG", layouts.RIGHT)
  layouts.mask(tmp_path / ".hidden.png", layouts.RIGHT)
  (tmp_path / "notes.txt").write_text("left alone")
  return tmp_path


def test_every_image_below_a_folder_is_a_record(folder):
  source = ImageFolderSource(folder)
  assert [source[i].images[0].name for i in range(len(source))] == [
    "b.png",
    "a.PNG",
  ]
  layouts.mask(folder / "c.png", layouts.LEFT)
  assert ImageFolderSource(folder).fingerprint != source.fingerprint
  (folder / "empty").mkdir()
  with pytest.raises(DataError, match="empty contains no images"):
    ImageFolderSource(folder / "empty")


def test_masks_of_a_folder_are_those_of_its_files(folder):
  rows = rows_of(source="image_folder", path=str(folder), mask_channels=1)
  for index, seg_mask in enumerate((layouts.LEFT, layouts.RIGHT)):
    row = rows(index)
    assert row.bad == ()
    assert row.fields.seg_masks.shape == (1, 16, 16, 1)
    drawn = row.fields.seg_masks.mean() / 255
    assert drawn == pytest.approx(seg_mask.mean(), abs=0.02)


@pytest.mark.parametrize(
  "layout", ["refer", "folder", "text_to_image", "jsonl"]
)
def test_targets_of_three_channels_are_the_images(layout, tmp_path):
  given = layouts.write(layout, tmp_path) | {"max_masks": 1, "mask_channels": 3}
  row = rows_of(**given)(0)
  assert row.bad == ()
  colors = row.fields.seg_masks[0].astype(int)
  # Half of `layouts.image` is noise, its boxes are red and blue.
  assert np.ptp(colors, axis=-1).max() > 100
  assert row.fields.mask_valid.all()


def test_a_record_without_an_image_is_named(tmp_path):
  given = layouts.write("jsonl", tmp_path) | {
    "max_masks": 1,
    "mask_channels": 3,
  }
  row = rows_of(**given)(4)
  assert "line 5 has no image" in row.bad[0][1]
