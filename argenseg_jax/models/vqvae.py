"""VAR's image tokenizer: convolutional encoder, quantizer, decoder.

An image becomes codes of several scales and codes become an image again. Each
entry of `width_multipliers` is one resolution level; a level after the first
halves the side. Images are [b h w 3] in [-1, 1].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from argenseg_jax import construct
from argenseg_jax.model_config import VQVAEConfig
from argenseg_jax.models import attention, layers
from argenseg_jax.models.vq import Quantizer


class Reconstruction(NamedTuple):
  """What a training pass of the image tokenizer gives."""

  images: Float[Array, "b h w 3"]  # Not clamped.
  vq_loss: Float[Array, "b"]  # 0 when nothing was quantized.
  codes: Int[Array, "b n"] | None  # None when nothing was quantized.
  latent: Float[Array, "b h2 w2 c"]  # Before quantization.


class VQVAE(nnx.Module):
  """The image tokenizer; `dtype` is that of encoder and decoder only."""

  def __init__(
    self,
    config: VQVAEConfig,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    down = config.patch_side * 2 ** (len(config.width_multipliers) - 1)
    if config.image_side != config.scales[-1] * down:
      raise ValueError(
        f"vqvae.image_side is {config.image_side}, but the last of vqvae.scales"
        f" ({config.scales[-1]}) times the downsampling by {down} of"
        f" vqvae.patch_side {config.patch_side} and"
        f" {len(config.width_multipliers)} vqvae.width_multipliers is"
        f" {config.scales[-1] * down}: make them agree."
      )
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    c = config.latent_channels
    self.encoder = Encoder(config, **types)
    self.quant_conv = layers.Conv(c, c, 3, padding=1, **types)
    self.quantizer = Quantizer(config, rngs=rngs, param_dtype=param_dtype)
    self.post_quant_conv = layers.Conv(c, c, 3, padding=1, **types)
    self.decoder = Decoder(config, **types)

  def __call__(
    self, images: Float[Array, "b h w 3"], *, quantize: bool = True
  ) -> Reconstruction:
    """Encodes, quantizes (a plain autoencoder without `quantize`), decodes."""
    latent = self.encode_latent(images)
    if not quantize:
      loss = jnp.zeros(images.shape[:1], jnp.float32)
      return Reconstruction(self.decode_latent(latent), loss, None, latent)
    quantized = self.quantizer(latent)
    return Reconstruction(
      images=self.decode_latent(quantized.latent),
      vq_loss=quantized.loss,
      codes=quantized.codes,
      latent=latent,
    )

  @jax.named_scope("vq_encode")
  def encode_latent(
    self, images: Float[Array, "b h w 3"]
  ) -> Float[Array, "b h2 w2 c"]:
    """What the quantizer codes, float32."""
    return self.quant_conv(self.encoder(images)).astype(jnp.float32)

  def encode(self, images: Float[Array, "b h w 3"]) -> Int[Array, "b n"]:
    """Codes of all scales, int32, coarse to fine."""
    return self.quantizer.encode(self.encode_latent(images))

  @jax.named_scope("vq_decode")
  def decode_latent(
    self, latent: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 3"]:
    """The image of a (partial) latent, float32, not clamped."""
    return self.decoder(self.post_quant_conv(latent)).astype(jnp.float32)

  def decode(
    self, codes: Int[Array, "b n"], num_scales: int | None = None
  ) -> Float[Array, "b h w 3"]:
    """The image of codes of the first `num_scales` scales (default all),
    clamped to [-1, 1]."""
    latent = self.quantizer.sum_scales(codes, num_scales)
    return _clamp(self.decode_latent(latent))

  def decode_prefixes(
    self, codes: Int[Array, "b n"]
  ) -> Float[Array, "b k h w 3"]:
    """The clamped images of the first 1, 2, .. scales."""
    partials = self.quantizer.prefixes(codes)
    images = self.decode_latent(partials.reshape(-1, *partials.shape[2:]))
    return _clamp(images).reshape(*partials.shape[:2], *images.shape[1:])


class Encoder(nnx.Module):
  """Images to latents; attention at the lowest resolution and after it.

  Attributes:
    levels: finest first.
  """

  def __init__(
    self,
    config: VQVAEConfig,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    groups = config.norm_groups
    widths = [config.width * m for m in config.width_multipliers]
    self.patch_side = config.patch_side
    channels = 3 * config.patch_side**2
    self.conv_in = layers.Conv(channels, config.width, 3, padding=1, **types)
    self.levels = nnx.List()
    features = config.width
    for i, width in enumerate(widths):
      last = i == len(widths) - 1
      # Halving pads bottom and right only.
      halve = {"stride": 2, "padding": (0, 1)}
      level = Level(
        features,
        width,
        groups,
        num_blocks=config.blocks_per_level,
        attention=last,
        resample=None
        if last
        else layers.Conv(width, width, 3, **halve, **types),
        **types,
      )
      self.levels.append(level)
      features = width
    self.middle = Middle(features, groups, **types)
    self.norm_out = _norm(features, groups, rngs, param_dtype)
    self.conv_out = layers.Conv(
      features, config.latent_channels, 3, padding=1, **types
    )

  def __call__(
    self, images: Float[Array, "b h w 3"]
  ) -> Float[Array, "b h2 w2 c"]:
    x = self.conv_in(_space_to_depth(images, self.patch_side))
    for level in self.levels:
      x = level(x)
      if level.resample is not None:
        x = level.resample(x)
    x = self.middle(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
  """Latents to images; attention before and at the lowest resolution.

  Attributes:
    levels: finest first, as in the encoder; they run from the last to the
      first, with one residual block more than the encoder's.
  """

  def __init__(
    self,
    config: VQVAEConfig,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    groups = config.norm_groups
    widths = [config.width * m for m in config.width_multipliers]
    features = widths[-1]
    self.conv_in = layers.Conv(
      config.latent_channels, features, 3, padding=1, **types
    )
    self.middle = Middle(features, groups, **types)
    levels = []
    for i, width in reversed(list(enumerate(widths))):
      level = Level(
        features,
        width,
        groups,
        num_blocks=config.blocks_per_level + 1,
        attention=i == len(widths) - 1,
        resample=layers.Conv(width, width, 3, padding=1, **types)
        if i
        else None,
        **types,
      )
      levels.append(level)
      features = width
    self.levels = nnx.List(levels[::-1])
    self.norm_out = _norm(features, groups, rngs, param_dtype)
    self.patch_side = config.patch_side
    channels = 3 * config.patch_side**2
    self.conv_out = layers.Conv(features, channels, 3, padding=1, **types)

  def __call__(
    self, latent: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 3"]:
    x = self.middle(self.conv_in(latent))
    for level in self.levels[::-1]:
      x = level(x)
      if level.resample is not None:
        x = level.resample(_double(x))
    x = self.conv_out(jax.nn.silu(self.norm_out(x)))
    return _depth_to_space(x, self.patch_side)


class Level(nnx.Module):
  """Residual blocks of one resolution, each followed by attention if asked.

  Attributes:
    resample: the convolution that leaves this resolution, for the owner to
      apply; None at the end.
  """

  def __init__(
    self,
    in_features: int,
    features: int,
    groups: int,
    *,
    num_blocks: int,
    attention: bool,
    resample: layers.Conv | None,
    rngs: construct.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    self.resample = resample
    self.blocks = nnx.List(
      ResidualBlock(features if j else in_features, features, groups, **types)
      for j in range(num_blocks)
    )
    self.attentions = nnx.List(
      SpatialAttention(features, groups, **types)
      for _ in range(num_blocks if attention else 0)
    )

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    for j, block in enumerate(self.blocks):
      x = block(x)
      if self.attentions:
        x = self.attentions[j](x)
    return x


class Middle(nnx.Module):
  """Two residual blocks around attention."""

  def __init__(
    self,
    features: int,
    groups: int,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    self.block_1 = ResidualBlock(features, features, groups, **types)
    self.attention = SpatialAttention(features, groups, **types)
    self.block_2 = ResidualBlock(features, features, groups, **types)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return self.block_2(self.attention(self.block_1(x)))


class ResidualBlock(nnx.Module):
  """Two norm-silu-conv steps beside a shortcut (1x1 where widths differ)."""

  def __init__(
    self,
    in_features: int,
    features: int,
    groups: int,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    self.norm_1 = _norm(in_features, groups, rngs, param_dtype)
    self.conv_1 = layers.Conv(in_features, features, 3, padding=1, **types)
    self.norm_2 = _norm(features, groups, rngs, param_dtype)
    self.conv_2 = layers.Conv(features, features, 3, padding=1, **types)
    self.shortcut = (
      None
      if in_features == features
      else layers.Conv(in_features, features, 1, **types)
    )

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    y = self.conv_1(jax.nn.silu(self.norm_1(x)))
    y = self.conv_2(jax.nn.silu(self.norm_2(y)))
    return y + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nnx.Module):
  """x + one-head attention between all cells of a map."""

  def __init__(
    self,
    features: int,
    groups: int,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    self.norm = _norm(features, groups, rngs, param_dtype)
    self.qkv = layers.Conv(features, 3 * features, 1, **types)
    self.out = layers.Conv(features, features, 1, **types)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    qkv = self.qkv(self.norm(x)).reshape(b, h * w, 3, c)
    y = attention.attend(qkv[:, :, :1], qkv[:, :, 1:2], qkv[:, :, 2:])
    return x + self.out(y.reshape(b, h, w, c))


def _norm(features, groups, rngs, param_dtype) -> layers.GroupNorm:
  return layers.GroupNorm(features, groups, rngs=rngs, param_dtype=param_dtype)


def _double(x: Array) -> Array:
  """Nearest upsampling by two."""
  return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


def _clamp(images: Array) -> Array:
  return jnp.clip(images, -1, 1)


def _space_to_depth(x: Array, side: int) -> Array:
  """[b h w c] -> [b h/side w/side side*side*c]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // side, side, w // side, side, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // side, w // side, -1)


def _depth_to_space(x: Array, side: int) -> Array:
  """The reverse of `_space_to_depth`."""
  b, h, w, _ = x.shape
  x = x.reshape(b, h, w, side, side, -1)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * side, w * side, -1)
