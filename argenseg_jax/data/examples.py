"""Rows for a run: sizes agreed with the model, masks tokenized once."""

import dataclasses

from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data import pipeline, text
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.model_config import ModelConfig


def make_rows(
  data: DataConfig,
  model: ModelConfig,
  tokenizer: text.TextTokenizer | None,
) -> pipeline.RowMaker:
  """Rows with the sizes that the model asks for.

  Args:
    data: what rows hold and where they come from.
    model: sizes.
    tokenizer: the text tokenizer; None for rows without text (see
      `masks_only`).

  Raises:
    ConfigError: a setting that does not suit the model, or is out of range.
  """
  reads_images = data.max_images > 0
  if reads_images and data.image_side != model.vision.image_side:
    raise ConfigError(
      f"config key 'data.image_side' is {data.image_side}, but the model's "
      f"vision tower takes {model.vision.image_side}."
    )
  if data.mask_side != model.vqvae.image_side:
    raise ConfigError(
      f"config key 'data.mask_side' is {data.mask_side}, but the model's image "
      f"tokenizer takes {model.vqvae.image_side}."
    )
  if data.jpeg_quality and data.cache:
    raise ConfigError(
      "config key 'data.jpeg_quality' gives another image at each visit; set "
      "'data.cache' to False."
    )
  return pipeline.RowMaker(
    open_source(data),
    data,
    tokenizer=tokenizer,
    image_tokens=model.vision.num_embeddings,
    num_codes=model.vqvae.codes_per_mask,
  )


def masks_only(data: DataConfig) -> DataConfig:
  """The settings of rows that hold seg_masks and nothing else: what an image
  tokenizer trains on."""
  return dataclasses.replace(
    data,
    sequence_length=0,
    max_images=0,
    pack=1,
    cache_codes=False,
    codes="",
    warmup_split="",
    warmup_steps=0,
  )


def asks_for_images(rows: pipeline.RowMaker) -> bool:
  """Whether the first record wants an image, which no metric judges."""
  return len(rows.source) > 0 and rows.source[0].target == "picture"


def of_split(
  rows: pipeline.RowMaker, split: str, *, evaluation: bool = True
) -> pipeline.RowMaker:
  """The same rows of another split, to be evaluated or trained on."""
  data = dataclasses.replace(rows.config, split=split)
  if evaluation:
    data = dataclasses.replace(data, cache=False)
  return pipeline.RowMaker(
    open_source(data, evaluation=evaluation),
    data,
    tokenizer=rows.text_tokenizer,
    image_tokens=rows.image_tokens,
    num_codes=rows.num_codes,
  )
