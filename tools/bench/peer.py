"""The ten-step loop in PyTorch: what `argenseg bench generate` runs beside.

Random weights of the same sizes: Llama layers and cache of `transformers`, a
plain vision tower and VAR's VQ decoder. One mask at batch 1.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from argenseg_jax.model_config import (
  LLMConfig,
  ModelConfig,
  VisionConfig,
  VQVAEConfig,
)
from argenseg_jax.runtime.cpu import num_cores
from argenseg_jax.tools.bench.timing import median_seconds

_PROMPT_TEXT = 40
# `transformers` has renamed the argument.
_CACHE = (
  "cache"
  if "cache" in inspect.signature(LlamaModel.forward).parameters
  else "past_key_values"
)


class VisionTower(nn.Module):
  """Pre-norm ViT, pixel shuffle and a two-layer connector."""

  def __init__(self, config: VisionConfig, llm_width: int):
    super().__init__()
    d, self.shuffle = config.width, config.pixel_shuffle
    self.grid = config.grid_side
    self.patch = nn.Conv2d(3, d, config.patch_side, config.patch_side)
    self.position = nn.Parameter(torch.randn(1 + self.grid**2, d))
    self.layers = nn.ModuleList(
      nn.TransformerEncoderLayer(
        d,
        config.num_heads,
        config.mlp_width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
      )
      for _ in range(config.num_layers)
    )
    merged = d * self.shuffle**2
    self.connector = nn.Sequential(
      nn.LayerNorm(merged),
      nn.Linear(merged, llm_width),
      nn.GELU(),
      nn.Linear(llm_width, llm_width),
    )

  def forward(self, images):
    x = self.patch(images).flatten(2).mT
    x = F.pad(x, (0, 0, 1, 0)) + self.position
    for layer in self.layers:
      x = layer(x)
    x = x[:, 1:].mT.unflatten(2, (self.grid, self.grid))
    return self.connector(F.pixel_unshuffle(x, self.shuffle).flatten(2).mT)


class Block(nn.Module):
  """Two norm-silu-convolution steps beside a shortcut."""

  def __init__(self, before: int, after: int):
    super().__init__()
    self.steps = nn.Sequential(
      nn.GroupNorm(32, before, eps=1e-6),
      nn.SiLU(),
      nn.Conv2d(before, after, 3, padding=1),
      nn.GroupNorm(32, after, eps=1e-6),
      nn.SiLU(),
      nn.Conv2d(after, after, 3, padding=1),
    )
    same = before == after
    self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1)

  def forward(self, x):
    return self.shortcut(x) + self.steps(x)


class Attention(nn.Module):
  """x + one-head attention between all cells."""

  def __init__(self, width: int):
    super().__init__()
    self.norm = nn.GroupNorm(32, width, eps=1e-6)
    self.qkv = nn.Conv2d(width, 3 * width, 1)
    self.out = nn.Conv2d(width, width, 1)

  def forward(self, x):
    q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, -1)
    y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
    return x + self.out(y[:, 0].mT.reshape(x.shape))


def vq_decoder(width, multipliers, blocks, channels) -> nn.Sequential:
  """From the latent to pixels, as VAR builds it."""
  widths = [width * m for m in multipliers]
  now = widths[-1]
  modules = [
    nn.Conv2d(channels, channels, 3, padding=1),
    nn.Conv2d(channels, now, 3, padding=1),
    Block(now, now),
    Attention(now),
    Block(now, now),
  ]
  for level in reversed(range(len(widths))):
    for _ in range(blocks + 1):
      modules.append(Block(now, widths[level]))
      now = widths[level]
      if level == len(widths) - 1:
        modules.append(Attention(now))
    if level:
      modules.append(nn.Upsample(scale_factor=2))
      modules.append(nn.Conv2d(now, now, 3, padding=1))
  modules += [nn.GroupNorm(32, now, eps=1e-6), nn.SiLU()]
  modules.append(nn.Conv2d(now, 3, 3, padding=1))
  return nn.Sequential(*modules)


class Quantizer(nn.Module):
  """Codebook, phis and the partial latent that they add up to."""

  def __init__(self, config: VQVAEConfig):
    super().__init__()
    c, self.scales = config.latent_channels, config.scales
    self.codebook = nn.Embedding(config.num_codes, c)
    self.phis = nn.ModuleList(
      nn.Conv2d(c, c, 3, padding=1) for _ in range(config.num_phis)
    )

  def add(self, latent, codes, k: int):
    """The partial latent once scale `k` is in it."""
    now, side = self.scales[k], self.scales[-1]
    rows = self.codebook(codes).mT.reshape(len(codes), -1, now, now)
    if now != side:
      rows = F.interpolate(rows, (side, side), mode="bicubic")
    phi = self.phis[k * len(self.phis) // len(self.scales)]
    return latent + 0.5 * rows + 0.5 * phi(rows)

  def vectors_at(self, latent, k: int):
    """A latent at scale `k`, [b n c]."""
    now = self.scales[k]
    if now != self.scales[-1]:
      latent = F.interpolate(latent, (now, now), mode="area")
    return latent.flatten(2).mT


class Peer(nn.Module):
  """Image and prompt to a mask image, as the released loop goes."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    self.config = config
    llm, vqvae = config.llm, config.vqvae
    self.vision = VisionTower(config.vision, llm.width)
    self.llm = LlamaModel(llama_config(llm))
    self.code_head = nn.Linear(llm.width, vqvae.num_codes, bias=False)
    self.quantizer = Quantizer(vqvae)
    self.word_embed = nn.Linear(vqvae.latent_channels, llm.width)
    self.decoder = vq_decoder(
      vqvae.width,
      vqvae.width_multipliers,
      vqvae.blocks_per_level,
      vqvae.latent_channels,
    )

  def codes(self, vision, *, decode: str):
    """Runs the loop; `decode` is "all" prefixes, the "last", or "none"."""
    scales = self.config.vqvae.scales
    side = scales[-1]
    text = torch.randn(1, _PROMPT_TEXT, self.config.llm.width)
    cache = DynamicCache(config=self.llm.config)
    prompt = torch.cat((text[:, :5], vision, text[:, 5:]), 1)
    self.llm(inputs_embeds=prompt, **{_CACHE: cache})
    latent = torch.zeros(1, self.config.vqvae.latent_channels, side, side)
    x, images = text[:, :1], []
    for k in range(len(scales)):
      if k:
        x = self.word_embed(self.quantizer.vectors_at(latent, k))
      hidden = self.llm(inputs_embeds=x, **{_CACHE: cache}).last_hidden_state
      codes = self.code_head(hidden).argmax(-1)
      latent = self.quantizer.add(latent, codes, k)
      if decode == "all" or (decode == "last" and k == len(scales) - 1):
        images.append(self.decoder(latent))
    return images


def llama_config(config: LLMConfig) -> LlamaConfig:
  # A keyword of every config, which the class itself does not list.
  options: dict[str, Any] = {"attn_implementation": "sdpa"}
  return LlamaConfig(
    hidden_size=config.width,
    intermediate_size=config.mlp_width,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    vocab_size=config.vocab_size,
    **options,
  )


@torch.inference_mode()
def stages(
  config: ModelConfig,
  repeats: int,
  *,
  device: str = "cpu",
  dtype: str = "float32",
) -> Iterator[tuple[str, float]]:
  """Yields names and median seconds, on torch's `device` and in `dtype`."""
  torch.set_num_threads(num_cores())
  torch.set_default_device(device)
  torch.set_default_dtype(getattr(torch, dtype))
  torch.manual_seed(0)
  peer = Peer(config).eval()
  side = config.vision.image_side
  images = torch.randn(1, 3, side, side)
  vision = peer.vision(images)
  (image,) = peer.codes(vision, decode="last")
  if image.shape[-1] != config.vqvae.image_side:
    raise AssertionError(f"the peer drew {tuple(image.shape)}")
  runs = {
    "peer: vision tower": lambda: peer.vision(images),
    "peer: prefill and codes": lambda: peer.codes(vision, decode="none"),
    "peer: image to mask, one decode": lambda: peer.codes(
      peer.vision(images), decode="last"
    ),
    "peer: image to mask, a decode after each scale": lambda: peer.codes(
      peer.vision(images), decode="all"
    ),
  }
  for name, run in runs.items():

    def finished(run=run):
      run()
      if device == "cuda":
        torch.cuda.synchronize()

    finished()
    yield name, median_seconds(finished, repeats)
