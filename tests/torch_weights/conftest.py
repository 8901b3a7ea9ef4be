"""Tiny models of every family, and random PyTorch tensors that fit them."""

import dataclasses
import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
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
from argenseg_jax.torch_weights import hf_config, mapping, rules, tensors

VQVAE = VQVAEConfig(
  image_side=8,
  scales=(1, 2, 4),
  width=32,
  width_multipliers=(1, 2),
  blocks_per_level=1,
  latent_channels=4,
  num_codes=16,
)
LLM = LLMConfig(
  vocab_size=40 + VQVAE.num_codes,
  width=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_width=24,
  rope_scaling="dynamic",
  rope_factor=2.0,
  max_positions=64,
  pad_id=2,
)
VISION = VisionConfig(
  image_side=28,
  width=8,
  num_layers=2,
  num_heads=2,
  mlp_width=12,
)
LLMS = {
  "internlm2": LLM,
  "internlm2_bias": dataclasses.replace(LLM, qkv_bias=True, out_bias=True),
  "qwen2": dataclasses.replace(
    LLM, family="qwen2", qkv_bias=True, rope_scaling="none"
  ),
  "qwen2_tied": dataclasses.replace(
    LLM, family="qwen2", qkv_bias=True, tied_head=True
  ),
  "qwen3": dataclasses.replace(LLM, family="qwen3", qk_norm=True, head_dim=6),
}
VISIONS = {
  "layer_norm": VISION,
  "rms_norm": dataclasses.replace(
    VISION, norm="rms_norm", qk_norm=True, qkv_bias=False
  ),
}


def whole(llm="internlm2", vision="layer_norm") -> ModelConfig:
  first_code = LLM.vocab_size - VQVAE.num_codes
  return ModelConfig(
    name="imported",
    vision=VISIONS[vision],
    llm=LLMS[llm],
    vqvae=VQVAE,
    token_ids=TokenIds(
      pad=2,
      bos=1,
      im_start=3,
      im_end=4,
      img_start=first_code - 8,
      img_end=first_code - 7,
      img_context=first_code - 6,
      mask=first_code - 4,
      ge_start=first_code - 3,
      ge_end=first_code - 2,
      mask_context=first_code - 1,
      first_code=first_code,
    ),
  )


def abstract(make) -> nnx.State:
  return nnx.state(construct.abstract(make))


def random_source(table, state, dtype=np.float32) -> tensors.Computed:
  """Random tensors for every PyTorch name of a table, idle buffers too."""
  rng = np.random.default_rng(0)
  shapes = mapping.torch_shapes(table, mapping.variables(state))
  shapes |= {kept.torch: kept.shape for kept in table.carried}
  made = {n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()}
  return tensors.Computed(
    {
      n: (tensors.TensorInfo(a.shape, a.dtype), lambda a=a: a)
      for n, a in made.items()
    }
  )


@pytest.fixture
def tiny():
  """The names of this module, for tests: conftest cannot be imported."""
  return types.SimpleNamespace(
    LLMS=LLMS,
    VISIONS=VISIONS,
    VQVAE=VQVAE,
    whole=whole,
    abstract=abstract,
    random_source=random_source,
  )


@pytest.fixture
def folder(tmp_path):
  """Writes a tiny ARGenSeg folder in the authors' layout, in three files."""

  def make(config: ModelConfig, dtype=ml_dtypes.bfloat16):
    path = tmp_path / "authors"
    path.mkdir()
    state = abstract(lambda: ARGenSeg(config, rngs=construct.Rngs(0)))
    source = random_source(rules.argenseg(config), state, dtype)
    size = sum(np.prod(i.shape) * 4 for i in source.tensors.values())
    tensors.write_folder(path, source, max_file_bytes=int(size) // 4)
    values = hf_config.write(config) | {"set": "toy"}
    (path / "config.json").write_text(json.dumps(values))
    return path

  return make


@pytest.fixture
def mesh():
  """Parameters split over four of the fake devices."""
  from argenseg_jax import sharding
  from argenseg_jax.config import MeshConfig

  config = MeshConfig(data=1, fsdp=2, tensor=2)
  return sharding.make_mesh(config, jax.devices()[:4])
