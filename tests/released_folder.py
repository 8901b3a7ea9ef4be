"""A tiny model in the layout of released folders, and images to train on."""

import json
import pathlib

import numpy as np
import slow_tokenizer
from flax import nnx
from PIL import Image, ImageDraw

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

_SPECIAL = (
  *("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
  *("<mask>", "<ge_start>", "<ge_end>", "<MASK_CONTEXT>"),
)


def _config(ids: dict[str, int]) -> ModelConfig:
  first = max(ids.values()) + 1
  return ModelConfig(
    name="imported",
    vision=VisionConfig(
      image_side=28, width=8, num_layers=1, num_heads=2, mlp_width=8
    ),
    llm=LLMConfig(
      vocab_size=first + 16,
      width=16,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=4,
      mlp_width=24,
      family="qwen2",
      qkv_bias=True,
      pad_id=2,
    ),
    vqvae=VQVAEConfig(
      image_side=8,
      scales=(1, 2),
      width=32,
      width_multipliers=(1, 2, 2),
      blocks_per_level=1,
      latent_channels=4,
      num_codes=16,
    ),
    token_ids=TokenIds(
      pad=2,
      bos=1,
      im_start=ids["<|im_start|>"],
      im_end=ids["<|im_end|>"],
      img_start=ids["<img>"],
      img_end=ids["</img>"],
      img_context=ids["<IMG_CONTEXT>"],
      mask=ids["<mask>"],
      ge_start=ids["<ge_start>"],
      ge_end=ids["<ge_end>"],
      mask_context=ids["<MASK_CONTEXT>"],
      first_code=first,
    ),
  )


def write(path: pathlib.Path) -> ModelConfig:
  """Sharded safetensors, a SentencePiece model, code that must not run."""
  path.mkdir()
  ids = slow_tokenizer.write_folder(path, slow_tokenizer.train(), _SPECIAL)
  config = _config(ids)
  table = rules.argenseg(config)
  state = nnx.state(
    construct.abstract(lambda: ARGenSeg(config, rngs=construct.Rngs(0)))
  )
  shapes = mapping.torch_shapes(table, mapping.variables(state))
  shapes |= {kept.torch: kept.shape for kept in table.carried}
  rng = np.random.default_rng(0)
  arrays = {
    n: 0.3 * rng.normal(size=s).astype(np.float32) for n, s in shapes.items()
  }
  source = tensors.Computed(
    {
      n: (tensors.TensorInfo(a.shape, a.dtype), lambda a=a: a)
      for n, a in arrays.items()
    }
  )
  size = sum(a.nbytes for a in arrays.values())
  tensors.write_folder(path, source, max_file_bytes=size // 3)
  (path / "config.json").write_text(json.dumps(hf_config.write(config)))
  return config


def annotate(path: pathlib.Path) -> pathlib.Path:
  """Four images with a box each, as docs/own_masks.md has them."""
  path.mkdir()
  lines = []
  for i in range(4):
    box = (4 * i, 4, 4 * i + 12, 20)
    for name, mode, fill in (
      (f"{i}.jpg", "RGB", (200, 30 * i, 10)),
      (f"{i}.png", "L", 255),
    ):
      image = Image.new(mode, (32, 24))
      ImageDraw.Draw(image).rectangle(box, fill=fill)
      image.save(path / name)
    request = f"<image>\nPlease segment box {i} in this image."
    lines.append(
      {
        "id": str(i),
        "image": f"{i}.jpg",
        "mask": f"{i}.png",
        "conversations": [
          {"from": "human", "value": request},
          {"from": "gpt", "value": "Sure, the segmentation result: <mask>."},
        ],
      }
    )
  file = path / "train.jsonl"
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return file
