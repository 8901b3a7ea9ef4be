"""Named model sizes, from `tiny` to `argenseg_8b`.

InternVL's sizes are facts of their released `config.json` files; the code rows
follow the text vocabulary, as in ARGenSeg-8B.
"""

from collections.abc import Mapping
from typing import Any, Literal

from argenseg_jax import config as config_lib
from argenseg_jax import config_parsing
from argenseg_jax.data.text import TextTokenizer
from argenseg_jax.model_config import (
  LLMConfig,
  ModelConfig,
  TokenIds,
  VisionConfig,
  VQVAEConfig,
)
from argenseg_jax.scales import SCALES_512

_NUM_CODES = 4096


def _token_ids(text_vocab: int, first_special: int, **kwargs) -> TokenIds:
  """InternVL's `<img>`, `</img>`, `<IMG_CONTEXT>` stand together; ARGenSeg adds
  `<mask>`, `<ge_start>`, `<ge_end>`, `<MASK_CONTEXT>`, then the codes."""
  return TokenIds(
    img_start=first_special,
    img_end=first_special + 1,
    img_context=first_special + 2,
    mask=text_vocab,
    ge_start=text_vocab + 1,
    ge_end=text_vocab + 2,
    mask_context=text_vocab + 3,
    first_code=text_vocab + 4,
    **kwargs,
  )


def _internlm2(name: str, llm: dict[str, Any]) -> ModelConfig:
  text_vocab = 92553
  return ModelConfig(
    name=name,
    vision=VisionConfig(),
    llm=LLMConfig(
      vocab_size=text_vocab + 4 + _NUM_CODES,
      head_dim=128,
      rope_scaling="dynamic",
      rope_factor=2.0,
      pad_id=2,
      **llm,
    ),
    vqvae=VQVAEConfig(),
    token_ids=_token_ids(
      text_vocab, 92544, pad=2, bos=1, im_start=92543, im_end=92542
    ),
  )


def _qwen(
  name: str, family: Literal["qwen2", "qwen3"], llm: dict[str, Any]
) -> ModelConfig:
  """Qwen2.5 and Qwen3 sizes, with InternVL's nine tokens behind Qwen's own."""
  qwen2 = family == "qwen2"
  own = 151665 if qwen2 else 151669
  text_vocab = own + 9
  return ModelConfig(
    name=name,
    vision=VisionConfig(),
    llm=LLMConfig(
      vocab_size=text_vocab + 4 + _NUM_CODES,
      family=family,
      norm_eps=1e-6,
      qkv_bias=qwen2,
      qk_norm=not qwen2,
      max_positions=32768 if qwen2 else 40960,
      **llm,
    ),
    vqvae=VQVAEConfig(),
    token_ids=_token_ids(
      text_vocab, own, pad=151643, im_start=151644, im_end=151645
    ),
  )


# Keys of `LLMConfig` in the columns below.
_COLUMNS = ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim")
_COLUMNS = (*_COLUMNS, "mlp_width")
_QWEN_SIZES: dict[str, tuple[Literal["qwen2", "qwen3"], tuple[int, ...]]] = {
  # On InternVL2.5 (Qwen2.5 of 0.5B and 3B).
  "argenseg_1b": ("qwen2", (896, 24, 14, 2, 64, 4864)),
  "argenseg_4b": ("qwen2", (2048, 36, 16, 2, 128, 11008)),
  # On InternVL3 (Qwen2.5).
  "argenseg_v3_1b": ("qwen2", (896, 24, 14, 2, 64, 4864)),
  "argenseg_v3_2b": ("qwen2", (1536, 28, 12, 2, 128, 8960)),
  "argenseg_v3_8b": ("qwen2", (3584, 28, 28, 4, 128, 18944)),
  "argenseg_v3_14b": ("qwen2", (5120, 48, 40, 8, 128, 13824)),
  # On InternVL3.5 (Qwen3).
  "argenseg_v35_1b": ("qwen3", (1024, 28, 16, 8, 128, 3072)),
  "argenseg_v35_2b": ("qwen3", (2048, 28, 16, 8, 128, 6144)),
  "argenseg_v35_4b": ("qwen3", (2560, 36, 32, 8, 128, 9728)),
  "argenseg_v35_8b": ("qwen3", (4096, 36, 32, 8, 128, 12288)),
  "argenseg_v35_14b": ("qwen3", (5120, 40, 40, 8, 128, 17408)),
}


def _tiny() -> ModelConfig:
  """The quickstart: 64 px, 85 codes a mask, trained from scratch on a CPU."""
  num_codes = 256
  token_ids = TextTokenizer().token_ids
  return ModelConfig(
    name="tiny",
    vision=VisionConfig(
      image_side=64,
      patch_side=8,
      width=96,
      num_layers=0,
      num_heads=2,
      mlp_width=192,
      pixel_shuffle=1,
      stem="conv",
      stem_blocks=3,
    ),
    llm=LLMConfig(
      vocab_size=token_ids.first_code + num_codes,
      width=96,
      num_layers=3,
      num_heads=2,
      num_kv_heads=2,
      head_dim=48,
      mlp_width=192,
      rope_theta=1e4,
      max_positions=4096,
      qk_norm=True,
      tie_first_head_init=True,
      rope_fraction=0.0,
      embedding_std=0.7,
    ),
    vqvae=VQVAEConfig(
      image_side=64,
      patch_side=4,
      scales=(1, 4, 8),
      width=32,
      width_multipliers=(1, 1),
      blocks_per_level=1,
      latent_channels=16,
      num_codes=num_codes,
      norm_groups=8,
    ),
    token_ids=token_ids,
    aligned_positions=True,
    bidirectional_prompt=True,
    full_attention_in_scale=True,
  )


def _bench() -> ModelConfig:
  """Between tiny and 1B, at the full scales: what a CPU can time."""
  text_vocab, num_codes = 8192, 4096
  special = dict(zip(("pad", "im_start", "im_end"), range(3), strict=True))
  ids = ("img_start", "img_end", "img_context", "mask")
  ids += ("ge_start", "ge_end", "mask_context")
  special |= dict(
    zip(ids, range(text_vocab - len(ids), text_vocab), strict=True)
  )
  return ModelConfig(
    name="bench",
    vision=VisionConfig(width=256, num_layers=4, num_heads=4, mlp_width=1024),
    llm=LLMConfig(
      vocab_size=text_vocab + num_codes,
      width=512,
      num_layers=8,
      num_heads=8,
      num_kv_heads=4,
      head_dim=64,
      mlp_width=1408,
      rope_scaling="dynamic",
      rope_factor=2.0,
      max_positions=4096,
    ),
    vqvae=VQVAEConfig(width=64),
    token_ids=TokenIds(first_code=text_vocab, **special),
  )


def _variants() -> dict[str, ModelConfig]:
  eight = _internlm2(
    "argenseg_8b",
    dict(
      width=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_width=14336
    ),
  )
  qwen = {
    name: _qwen(name, family, dict(zip(_COLUMNS, sizes, strict=True)))
    for name, (family, sizes) in _QWEN_SIZES.items()
  }
  return {
    "tiny": _tiny(),
    "bench": _bench(),
    "argenseg_2b": _internlm2(
      "argenseg_2b",
      dict(
        width=2048, num_layers=24, num_heads=16, num_kv_heads=8, mlp_width=8192
      ),
    ),
    "argenseg_8b": eight,
    "argenseg_8b_512": config_parsing.replace(
      eight,
      {
        "name": "argenseg_8b_512",
        "vqvae.image_side": 512,
        "vqvae.scales": SCALES_512,
      },
    ),
    **qwen,
  }


VARIANTS = _variants()


def get(name: str, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
  """The named variant, with dotted keys replaced.

  Raises:
    config.ConfigError: unknown variant or key.
  """
  if name not in VARIANTS:
    raise config_lib.ConfigError(
      f"unknown model variant {name!r}; use one of {', '.join(VARIANTS)}"
    )
  return config_parsing.replace(VARIANTS[name], overrides or {})
