"""A model of a few thousand parameters that tests share."""

import functools

import jax
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.model_config import (
  LLMConfig,
  ModelConfig,
  TokenIds,
  VisionConfig,
  VQVAEConfig,
)
from argenseg_jax.models.argenseg import ARGenSeg

TOKEN_IDS = TokenIds(
  pad=0,
  im_start=1,
  im_end=2,
  img_start=3,
  img_end=4,
  img_context=5,
  mask=6,
  ge_start=7,
  ge_end=8,
  mask_context=9,
  first_code=20,
)


def config(**changes) -> ModelConfig:
  """16 px pictures, 4 vision embeddings, scales 1, 2, 4, 11 codes."""
  return ModelConfig(
    name="test",
    vision=VisionConfig(
      image_side=16,
      patch_side=4,
      width=8,
      num_layers=1,
      num_heads=2,
      mlp_width=16,
    ),
    llm=LLMConfig(
      vocab_size=31,
      width=16,
      num_layers=2,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      mlp_width=24,
    ),
    vqvae=VQVAEConfig(
      image_side=16,
      scales=(1, 2, 4),
      patch_side=2,
      width=4,
      width_multipliers=(1, 2),
      blocks_per_level=1,
      latent_channels=4,
      num_codes=11,
      norm_groups=2,
    ),
    token_ids=TOKEN_IDS,
    **changes,
  )


def model(**changes) -> ARGenSeg:
  """A model with random code embeddings (they start at zero), a new one at each
  call."""
  return nnx.merge(*_parts(**changes))


@functools.cache
def _parts(**changes) -> tuple[nnx.GraphDef, nnx.State]:
  @jax.jit
  def build():
    made = ARGenSeg(config(**changes), rngs=construct.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 3)
    for key, param in zip(
      keys,
      (made.word_embed.kernel, made.lvl_embed, made.pos_embed),
      strict=True,
    ):
      param[...] = 0.5 * jax.random.normal(key, param.shape)
    return nnx.split(made)

  return build()
