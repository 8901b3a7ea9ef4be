"""Rows for a run: sizes agreed with the model, masks tokenised once."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import distributed, sharding
from argenseg_jax.config import ConfigError, DataConfig, ModelConfig
from argenseg_jax.data import pipeline, text
from argenseg_jax.data.sources.opening import open_source
from argenseg_jax.models.argenseg import normalize_seg_masks
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.monitor import Progress


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
  if task == "vqvae":
    data = dataclasses.replace(data, sequence_length=0, max_images=0)
  codes = sum(side * side for side in model.vqvae.scales)
  return pipeline.RowMaker(
    open_source(data),
    data,
    tokenizer=tokenizer,
    image_tokens=model.vision.num_embeddings,
    num_codes=codes,
  )


def tokenized(
  rows: pipeline.RowMaker, vqvae: VQVAE, path: pathlib.Path
) -> pipeline.RowMaker:
  """The same rows with the codes of their masks, kept in `path`."""
  if distributed.agree(path.exists()):
    codes = np.load(path)
  else:
    codes = tokenize(rows, vqvae)
    if distributed.is_main():
      with path.with_suffix(".partial").open("wb") as file:
        np.save(file, codes)
      path.with_suffix(".partial").rename(path)
  return pipeline.RowMaker(
    rows.source,
    rows.config,
    tokenizer=rows.tokenizer,
    image_tokens=rows.image_tokens,
    num_codes=rows.num_codes,
    codes=codes,
  )


def tokenize(
  rows: pipeline.RowMaker, vqvae: VQVAE, *, batch_size: int = 64
) -> np.ndarray:
  """Codes of all masks of a source, int32 [records m n]; 0 where none is."""
  graph, state = nnx.split(vqvae)

  @jax.jit
  def encode(state, seg_masks):
    return nnx.merge(graph, state).encode(normalize_seg_masks(seg_masks))

  masks_only = dataclasses.replace(
    rows.config, sequence_length=0, max_images=0, cache=False
  )
  reader = pipeline.RowMaker(
    rows.source,
    masks_only,
    tokenizer=rows.tokenizer,
    image_tokens=rows.image_tokens,
    num_codes=rows.num_codes,
  )
  total = len(rows.source)
  bar = Progress("tokenize masks", total)
  parts = []
  for batch in pipeline.eval_batches(reader, batch_size):
    b, m, *shape = batch.seg_masks.shape
    seg_masks = batch.seg_masks.reshape(b * m, *shape)
    codes = encode(state, sharding.put_like(seg_masks, state))
    codes = distributed.fetch(codes).reshape(b, m, -1)
    parts.append(np.where(batch.mask_valid[:, :, None], codes, 0))
    bar.update(min(len(parts) * batch_size, total))
  bar.close()
  return np.concatenate(parts)[:total]


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


def sample_seg_masks(
  rows: pipeline.RowMaker, count: int, *, first: int = 0
) -> jax.Array:
  """Masks of the records from `first` on (around the end), in [-1, 1].

  Returns:
    [b h w 3] with b = `count`, or fewer where the source is smaller.
  """
  found = []
  for index in range(first, first + len(rows.source)):
    row = rows(index % len(rows.source)).fields
    found.extend(row.seg_masks[row.mask_valid])
    if len(found) >= count:
      break
  return normalize_seg_masks(jnp.asarray(np.stack(found[:count])))
