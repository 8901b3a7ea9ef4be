"""Arrays that travel between modules, and the axis legend.

Axis letters in shapes: b rows of a batch, t positions of a sequence, d width of
the language model, i images of a row, m masks of a row, v vision embeddings of
an image, n codes of a mask (or of one scale), c latent channels, h w pixels or
cells, s cache slots, l layers, g key-value heads.

This module imports no jax, so that data workers start quickly; named tuples
are pytrees without registration.
"""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax.Array on the device.

# RGB of the vision tower's training images, of values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# `Batch.targets` below zero.
IGNORE_TARGET = -1  # No loss at this position.
CODE_TARGET = -2  # The next code of this row's masks, in order.

# Of a gray level's range; what is above it is the object.
MASK_THRESHOLD = 0.5


class Batch(NamedTuple):
  """What the data pipeline yields, for the VQ-VAE and for the MLLM alike.

  Rows are right-padded. A row may hold several packed samples.
  """

  tokens: Array  # int32 [b t]; 0 in padding.
  targets: Array  # int32 [b t]; the token to predict *from* each position.
  positions: Array  # int32 [b t]; RoPE positions, restart with each sample.
  segment_ids: Array  # int32 [b t]; 1.. for samples of a row, 0 for padding.
  is_prompt: Array  # bool [b t]; before a sample's first answer.
  images: Array  # uint8 [b i h w 3], RGB, in the order of their placeholders.
  seg_masks: Array  # uint8 [b m h w 1|3], 0..255, in the order of their slots.
  mask_valid: Array  # bool [b m]; False for unused places.
  codes: Array  # int32 [b m n] of those masks, or [b m 0]: not tokenized yet.
  sample_weight: Array  # float32 [b]; 0 for substitutes of bad records.
  sample_id: Array  # int64 [b]; index of the record, for logs.


class ModelInputs(NamedTuple):
  """One teacher-forced forward pass of `ARGenSeg`."""

  tokens: Array  # int32 [b t]
  positions: Array  # int32 [b t]
  segment_ids: Array  # int32 [b t]
  is_prompt: Array  # bool [b t]
  images: Array  # float32 [b i h w 3], normalized.
  scale_inputs: Array  # float32 [b m n-1 c], next-scale inputs of each mask.
