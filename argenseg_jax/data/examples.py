"""Rows for a run: sizes agreed with the model, masks tokenised once."""

import dataclasses

from argenseg_jax.config import ConfigError, DataConfig, ModelConfig
from argenseg_jax.data import pipeline, text
from argenseg_jax.data.sources.registry import open_source


def make_rows(
  data: DataConfig,
  task: str,
  model: ModelConfig,
  tokenizer: text.TextTokenizer,
) -> pipeline.RowMaker:
  """Rows for a task, with the sizes that the model asks for."""
  if data.image_side != model.vision.image_side:
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
      "config key 'data.jpeg_quality' gives another picture at each visit; set "
      "'data.cache' to False."
    )
  if task == "vqvae":
    data = dataclasses.replace(data, sequence_length=0, max_images=0, pack=1)
  return pipeline.RowMaker(
    open_source(data),
    data,
    tokenizer=tokenizer,
    image_tokens=model.vision.num_embeddings,
    num_codes=model.vqvae.codes_per_mask,
  )


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
    tokenizer=rows.tokenizer,
    image_tokens=rows.image_tokens,
    num_codes=rows.num_codes,
  )
