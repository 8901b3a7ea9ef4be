"""`argenseg predict` without a model, in a folder with images."""

import numpy as np
import pytest
from fake_predictor import Fake
from PIL import Image

from argenseg_jax.tools import warmup


@pytest.fixture
def fake(monkeypatch):
  predictor = Fake()
  monkeypatch.setattr(warmup, "open_predictor", lambda *_, **__: predictor)
  return predictor


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Images a.png, b.png and sub/a.png; sub/broken.jpg."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "in/sub").mkdir(parents=True)
  for i, name in enumerate(("a", "b", "sub/a")):
    pixels = np.full((4, 6 + 2 * i, 3), 50, np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"in/{name}.png")
  (tmp_path / "in/sub/broken.jpg").write_text("no image")
  (tmp_path / "in/notes.txt").write_text("no image")
  return tmp_path
