"""Text to image: guidance moves what is drawn; files are written."""

import shutil

import jax
import numpy as np
import pytest
import tiny_rows
from PIL import Image

from argenseg_jax import checkpoint
from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.config_parsing import to_dict
from argenseg_jax.data import text
from argenseg_jax.inference import text_to_image
from argenseg_jax.tools import cli, generate


@pytest.fixture
def loaded(tmp_path):
  shutil.copy(text.SHIPPED, tmp_path / "tokenizer.json")
  model = tiny_rows.model()
  return checkpoint.Loaded(
    task="mllm",
    config=model.config,
    meta={"run": {"data": to_dict(DataConfig(path=""))}},
    path=tmp_path / "checkpoints" / "1",
    model=model,
  )


def test_guidance_changes_pictures_but_not_their_first_scale(loaded):
  texts = ["a red circle", "two boats"]
  with jax.numpy_dtype_promotion("standard"):
    plain, plain_stages = text_to_image.draw_images(loaded, texts, guidance=0)
    guided, stages = text_to_image.draw_images(loaded, texts, guidance=8)
  assert plain.shape == guided.shape == (2, 16, 16, 3)
  # Guidance grows from 0 at the first scale.
  np.testing.assert_array_equal(plain_stages[:, 0], stages[:, 0])
  np.testing.assert_array_equal(plain_stages[:, -1], plain)
  assert (plain != guided).any()


def test_the_command_writes_pictures_and_strips(tmp_path, monkeypatch, capsys):
  stages = np.zeros((2, 3, 16, 16, 3), np.uint8)
  monkeypatch.setattr(checkpoint, "load", lambda path: path)
  monkeypatch.setattr(
    text_to_image, "draw_images", lambda *_, guidance: (stages[:, -1], stages)
  )
  command = ["--checkpoint=x", "--text", "a", "b", f"--out={tmp_path}/a.png"]
  assert generate.main(command) == 0
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ["a_0.png", "a_0_strip.png", "a_1.png", "a_1_strip.png"]
  with Image.open(tmp_path / "a_1.png") as picture:
    assert picture.size == (16, 16)
  assert cli.main(["generate", *command]) == 2
  assert "exists" in capsys.readouterr().err
  with pytest.raises(ConfigError, match="--guidance"):
    generate.main([*command, "--guidance=-1"])
