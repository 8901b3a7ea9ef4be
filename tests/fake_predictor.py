"""A predictor without a model, and `argenseg predict` asked of it."""

import json
import types

import numpy as np

from argenseg_jax.inference.segment import Prediction
from argenseg_jax.tools import cli


class Fake:
  """Answers with the left half; remembers what was asked together."""

  def __init__(self):
    self.batches = []

  def segment_batch(self, images, texts, **options):
    self.batches.append((len(images), list(texts), options))
    return [
      self.answer(image, text)
      for image, text in zip(images, texts, strict=True)
    ]

  def set_image(self, image):
    def ask(texts, **options):
      self.batches.append((1, list(texts), options))
      return [self.answer(image, text) for text in texts]

    return types.SimpleNamespace(segment_batch=ask)

  def answer(self, image, text):
    seg_mask = np.zeros((1, *image.shape[:2]), bool)
    seg_mask[:, :, : image.shape[1] // 2] = True
    count = 0 if text == "nothing" else 1
    return Prediction(
      seg_masks=seg_mask[:count],
      text=text + "<mask>" * count,
      confidences=np.full((count,), -0.5, np.float32),
      codes=np.zeros((count, 5), np.int32),
      _draw_strip=lambda: np.zeros((2, 4, 4, 3), np.uint8),
      _pad_square=False,
    )


def predict(*arguments) -> int:
  return cli.main(["predict", "--checkpoint=x", *arguments])


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]
