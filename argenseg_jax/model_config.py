"""Sizes of a model and of its parts, in frozen dataclasses."""

import dataclasses
from typing import Literal

from argenseg_jax.scales import Scales


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """InternViT-style tower, pixel shuffle and connector."""

  image_side: int = 448
  patch_side: int = 14
  width: int = 1024
  num_layers: int = 24
  num_heads: int = 16
  mlp_width: int = 4096
  norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
  norm_eps: float = 1e-6
  qkv_bias: bool = True
  qk_norm: bool = False
  layer_scale_init: float = 0.1
  drop_path: float = 0.0
  select_layer: int = -1  # Which layer's output the connector reads.
  pixel_shuffle: int = 2  # Neighbors merged along each side; 1 merges none.
  # "patch" cuts the image into patches with one convolution; "conv" reaches the
  # same grid by stride-2 3x3 convolutions, which small data learns better.
  stem: Literal["patch", "conv"] = "patch"
  stem_blocks: int = 0  # Residual 3x3 convolutions that follow a "conv" stem.

  @property
  def grid_side(self) -> int:
    return self.image_side // self.patch_side

  @property
  def embeddings_side(self) -> int:
    return self.grid_side // self.pixel_shuffle

  @property
  def num_embeddings(self) -> int:
    """Vision embeddings that one image gives to the language model."""
    return self.embeddings_side**2


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """Decoder-only language model: InternLM2, Qwen2 and Qwen3 families."""

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  # Whose names of tensors and config.json import reads and export writes.
  family: Literal["internlm2", "qwen2", "qwen3"] = "internlm2"
  norm_eps: float = 1e-5
  rope_theta: float = 1e6
  rope_scaling: Literal["none", "linear", "dynamic"] = "none"
  rope_factor: float = 1.0
  max_positions: int = 32768
  rope_fraction: float = 1.0  # Share of each head's dimensions that rotate.
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: bool = False
  tied_head: bool = False
  embedding_std: float = 0.02  # Of the word embedding's start.
  pad_id: int | None = None  # This row of the word embedding gets no gradient.
  # Head 0 of each layer starts with equal query and key projections, so that a
  # position first attends to positions that look like it.
  tie_first_head_init: bool = False


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
  """VAR's multi-scale image tokenizer."""

  image_side: int = 256
  # Squares of pixels that encoder and decoder treat as one; more than 1 makes
  # a small tokenizer quick.
  patch_side: int = 1
  scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
  width: int = 160
  width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  blocks_per_level: int = 2
  latent_channels: int = 32
  num_codes: int = 4096
  norm_groups: int = 32
  num_phis: int = 4
  phi_ratio: float = 0.5
  commitment: float = 0.25

  @property
  def pyramid(self) -> Scales:
    return Scales(self.scales, self.num_phis)

  @property
  def codes_per_mask(self) -> int:
    return self.pyramid.num_codes


@dataclasses.dataclass(frozen=True)
class TokenIds:
  """Ids of the special tokens; codes follow from `first_code` on."""

  pad: int
  im_start: int
  im_end: int
  img_start: int
  img_end: int
  img_context: int
  mask: int
  ge_start: int
  ge_end: int
  mask_context: int
  first_code: int
  bos: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The whole of ARGenSeg."""

  name: str
  vision: VisionConfig
  llm: LLMConfig
  vqvae: VQVAEConfig
  token_ids: TokenIds
  # Full attention between the codes of one scale (VAR's mask) instead of plain
  # causal attention.
  full_attention_in_scale: bool = False
  # Full attention between the prompt's tokens (prefix language model).
  bidirectional_prompt: bool = False
  # Vision embeddings and code slots start with the same 2-D sine-cosine
  # positions on aligned grids.
  aligned_positions: bool = False
