"""A training step in PyTorch: what `argenseg bench train` runs beside.

Random weights of the same sizes; vision tower and image tokenizer are frozen.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel

from argenseg_jax.model_config import ModelConfig, VQVAEConfig
from argenseg_jax.runtime.cpu import num_cores
from argenseg_jax.tools.bench.peer import (
  Attention,
  Block,
  Quantizer,
  VisionTower,
  llama_config,
)
from argenseg_jax.types import IGNORE_TARGET, Batch


def vq_encoder(config: VQVAEConfig) -> nn.Sequential:
  """From pixels to the latent, as VAR builds it."""
  widths = [config.width * m for m in config.width_multipliers]
  now, channels = widths[0], config.latent_channels
  modules = [
    nn.PixelUnshuffle(config.patch_side),
    nn.Conv2d(3 * config.patch_side**2, now, 3, padding=1),
  ]
  for level, width in enumerate(widths):
    last = level == len(widths) - 1
    for _ in range(config.blocks_per_level):
      modules.append(Block(now, width))
      now = width
      if last:
        modules.append(Attention(now))
    if not last:
      modules.append(nn.ZeroPad2d((0, 1, 0, 1)))
      modules.append(nn.Conv2d(now, now, 3, stride=2))
  modules += [Block(now, now), Attention(now), Block(now, now)]
  modules += [nn.GroupNorm(32, now, eps=1e-6), nn.SiLU()]
  modules.append(nn.Conv2d(now, channels, 3, padding=1))
  modules.append(nn.Conv2d(channels, channels, 3, padding=1))
  return nn.Sequential(*modules)


class TrainingPeer(nn.Module):
  """Teacher-forced decoder with one head for words and codes."""

  def __init__(self, config: ModelConfig):
    torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    super().__init__()
    llm, vqvae = config.llm, config.vqvae
    self.config = config
    self.vision = VisionTower(config.vision, llm.width)
    self.llm = LlamaModel(llama_config(llm))
    self.head = nn.Linear(llm.width, llm.vocab_size, bias=False)
    self.encoder = vq_encoder(vqvae)
    self.quantizer = Quantizer(vqvae)
    self.word_embed = nn.Linear(vqvae.latent_channels, llm.width)
    self.lvl_embed = nn.Embedding(len(vqvae.scales), llm.width)
    counts = torch.tensor([side * side for side in vqvae.scales])
    self.scale_of_code = torch.arange(len(counts)).repeat_interleave(counts)
    self.pos_embed = nn.Embedding(len(self.scale_of_code), llm.width)
    for frozen in (self.vision, self.encoder, self.quantizer):
      frozen.requires_grad_(False)
    self.vision.connector.requires_grad_(True)

  @torch.no_grad()
  def tokenize(self, seg_masks):
    """Codes [b n] and the inputs [b n-1 c] that follow from them."""
    latent = self.encoder(seg_masks)
    codebook = self.quantizer.codebook.weight
    partial, codes, inputs = torch.zeros_like(latent), [], []
    for k in range(len(self.config.vqvae.scales)):
      if k:
        inputs.append(self.quantizer.vectors_at(partial, k))
      vectors = self.quantizer.vectors_at(latent - partial, k)
      distance = codebook.square().sum(1) - 2 * vectors @ codebook.T
      codes.append(distance.argmin(-1))
      partial = self.quantizer.add(partial, codes[-1], k)
    return torch.cat(codes, 1), torch.cat(inputs, 1)

  def forward(self, tokens, targets, images, seg_masks):
    """The loss of rows that are words, an image, words, one mask."""
    codes, inputs = self.tokenize(seg_masks)
    n = codes.shape[1]
    ids = self.config.token_ids
    is_image = tokens[0] == ids.img_context
    first = int(is_image.int().argmax())
    last = first + int(is_image.sum())
    x = self.llm.embed_tokens(tokens)
    slots = self.word_embed(inputs) + self.pos_embed.weight[1:]
    slots = slots + self.lvl_embed(self.scale_of_code[1:])
    x = torch.cat(
      (x[:, :first], self.vision(images), x[:, last : 1 - n], slots), 1
    )
    hidden = self.llm(inputs_embeds=x, use_cache=False).last_hidden_state
    logits = self.head(hidden)
    text_loss = F.cross_entropy(
      logits[:, :-n].flatten(0, 1),
      targets[:, :-n].flatten(),
      ignore_index=IGNORE_TARGET,
    )
    code_loss = F.cross_entropy(
      logits[:, -n:].flatten(0, 1), ids.first_code + codes.flatten()
    )
    return text_loss + code_loss

  def step(self, batch: Batch) -> float:
    """Forward and backward; gradients stay at the parameters."""
    self.zero_grad(set_to_none=True)
    loss = self(
      torch.from_numpy(batch.tokens).long(),
      torch.from_numpy(batch.targets).long(),
      _pixels(batch.images),
      _pixels(batch.seg_masks),
    )
    loss.backward()
    return loss.item()


def _pixels(images: np.ndarray) -> torch.Tensor:
  """[b 1 h w 3] of bytes as [b 3 h w] in [-1, 1]."""
  return torch.from_numpy(images[:, 0]).permute(0, 3, 1, 2) / 127.5 - 1
