"""InternViT-style vision tower, pixel shuffle and connector.

Images [b h w 3] (square, normalized) become vision embeddings [b v d] for the
language model. Facts that decide parity with InternViT: no final norm, exact
GELU, layer scale, queries and keys normed over all heads jointly.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from argenseg_jax import construct
from argenseg_jax.model_config import VisionConfig
from argenseg_jax.models import attention, layers, resize

_position_init = nnx.initializers.normal(0.02)


class VisionEncoder(nnx.Module):
  """Tower and connector.

  Attributes:
    tower: a `VisionTower`.
    connector: a `Connector` from shuffled patches to the width of the language
      model.
  """

  def __init__(
    self,
    config: VisionConfig,
    llm_width: int,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    if config.grid_side % config.pixel_shuffle:
      raise ValueError(
        f"vision.pixel_shuffle is {config.pixel_shuffle}, which does not divide"
        f" the {config.grid_side} patches along a side of the image."
      )
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    self.pixel_shuffle = config.pixel_shuffle
    self.num_layers = _layers_to_run(config)
    self.tower = VisionTower(config, **types)
    features = config.width * config.pixel_shuffle**2
    self.connector = Connector(features, llm_width, **types)

  def __call__(
    self,
    images: Float[Array, "b h w 3"],
    *,
    remat_policy: Callable | bool | None = False,
    drop_path: Float[Array, "b l 2"] | None = None,
  ) -> Float[Array, "b v d"]:
    """Vision embeddings in raster order.

    Args:
      images: normalized pixels.
      remat_policy: of the tower's layers, as in `layers.layer_scan`.
      drop_path: uniform noise that switches stochastic depth on: one number
        for each image, layer and branch.
    """
    hidden = self.tower(
      images,
      num_layers=self.num_layers,
      remat_policy=remat_policy,
      drop_path=drop_path,
    )
    patches = hidden[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    grid = patches.reshape(-1, side, side, patches.shape[-1])
    merged = pixel_shuffle(grid, self.pixel_shuffle)
    return self.connector(merged.reshape(len(merged), -1, merged.shape[-1]))


class VisionTower(nnx.Module):
  """The transformer: patches and a class token through all layers.

  Attributes:
    patch_embedding: from pixels to the grid of patches: one convolution, or a
      `ConvStem`.
    class_embedding: [d].
    position_embedding: [1 + patches, d], the class token's row first.
    layers: stacked `VisionLayer`s; None without layers.
  """

  def __init__(
    self,
    config: VisionConfig,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    width, side = config.width, config.patch_side
    if config.image_side % side:
      raise ValueError(
        f"vision.image_side {config.image_side} is no multiple of"
        f" vision.patch_side {side}."
      )
    self.dtype = dtype
    self.patch_side = side
    self.grid_side = config.grid_side
    # A tuple: an array would become a variable of the model.
    self.drop_rates = tuple(
      np.linspace(0, config.drop_path, config.num_layers).tolist()
    )
    if config.stem == "conv":
      self.patch_embedding = ConvStem(side, width, config.stem_blocks, **types)
    else:
      self.patch_embedding = layers.Conv(3, width, side, stride=side, **types)
    self.class_embedding = layers.param(
      rngs, (width,), ("embed",), _position_init, param_dtype
    )
    self.position_embedding = layers.param(
      rngs,
      (1 + config.grid_side**2, width),
      (None, "embed"),
      _position_init,
      param_dtype,
    )
    self.layers: nnx.Pytree | None = (
      layers.stack(
        lambda rngs: VisionLayer(config, **{**types, "rngs": rngs}),
        config.num_layers,
        rngs,
      )
      if config.num_layers
      else None
    )

  def __call__(
    self,
    images: Float[Array, "b h w 3"],
    *,
    num_layers: int | None = None,
    remat_policy: Callable | bool | None = False,
    drop_path: Float[Array, "b l 2"] | None = None,
  ) -> Float[Array, "b t d"]:
    """Hidden states of the class token and the patches, no final norm.

    Args:
      images: square, of any side that is a multiple of the patch side; the
        position grid is resampled where it differs from the trained one.
      num_layers: run only the first so many layers (default all).
      remat_policy: as in `layers.layer_scan`.
      drop_path: uniform noise that switches stochastic depth on: one number
        for each image, layer and branch.
    """
    x = self.embed(images)
    count = len(self.drop_rates) if num_layers is None else num_layers
    if not count or self.layers is None:
      return x
    drops = None
    if drop_path is not None:
      noise = jnp.moveaxis(drop_path, 0, 2)[:count]
      drops = (jnp.asarray(self.drop_rates[:count]), noise)
    x, _ = layers.layer_scan(
      layers.first_of(self.layers, count),
      lambda layer, x, drop: (layer(x, drop), None),
      x,
      drops,
      remat_policy=remat_policy,
    )
    return x

  def positions(self, side: int) -> Float[Array, "p d"]:
    """Positions of `side` x `side` patches, bicubic from the trained grid."""
    grid = self.position_embedding[...][1:].astype(jnp.float32)
    if side == self.grid_side:
      return grid
    grid = grid.reshape(1, self.grid_side, self.grid_side, -1)
    matrix = resize.bicubic_matrix(self.grid_side, side)
    return resize.resize_with(matrix, grid).reshape(side * side, -1)

  def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
    """Class token and patches with their positions."""
    height, width = images.shape[1:3]
    if height != width or height % self.patch_side:
      raise ValueError(
        f"images of {height} x {width} pixels do not fit the vision tower: give"
        f" squares with a side that is a multiple of {self.patch_side}."
      )
    x = self.patch_embedding(images)
    b, side, _, d = x.shape
    x = x.reshape(b, side * side, d) + self.positions(side).astype(x.dtype)
    token = self.class_embedding[...] + self.position_embedding[...][0]
    token = jnp.broadcast_to(token.astype(x.dtype), (b, 1, d))
    return jnp.concatenate((token, x), 1)


class ConvStem(nnx.Module):
  """Stride-2 3x3 convolutions with GELU between, widths doubling, then
  residual 3x3 convolutions, each of which sees one patch further around."""

  def __init__(
    self,
    patch_side: int,
    width: int,
    num_blocks: int = 0,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    steps = patch_side.bit_length() - 1
    if patch_side != 2**steps or not steps or width % 2 ** (steps - 1):
      raise ValueError(
        f'vision.stem "conv" halves the image until a patch is one cell and'
        f" doubles the width: vision.patch_side {patch_side} must be a power of"
        f" two above 1, and vision.width {width} divisible by half of it."
      )
    widths = [width // 2 ** (steps - 1 - i) for i in range(steps)]
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    self.convs = nnx.List(
      layers.Conv(i, o, 3, stride=2, padding=1, **types)
      for i, o in zip([3, *widths[:-1]], widths, strict=True)
    )
    self.norms = nnx.List(
      layers.RMSNorm(width, rngs=rngs, eps=1e-6, param_dtype=param_dtype)
      for _ in range(num_blocks)
    )
    self.blocks = nnx.List(
      layers.Conv(width, width, 3, padding=1, **types)
      for _ in range(num_blocks)
    )

  def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 d"]:
    for i, conv in enumerate(self.convs):
      x = conv(_gelu(x) if i else x)
    for norm, conv in zip(self.norms, self.blocks, strict=True):
      x = x + conv(_gelu(norm(x)))
    return x


class VisionLayer(nnx.Module):
  """Pre-norm attention and MLP, each with layer scale and drop path."""

  def __init__(
    self,
    config: VisionConfig,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    d = config.width
    if d % config.num_heads:
      raise ValueError(
        f"vision.width {d} is no multiple of vision.num_heads"
        f" {config.num_heads}."
      )
    self.num_heads = config.num_heads
    norm_types = {
      "rngs": rngs,
      "eps": config.norm_eps,
      "param_dtype": param_dtype,
    }
    norm = layers.RMSNorm if config.norm == "rms_norm" else layers.LayerNorm
    self.norm_1 = norm(d, **norm_types)
    self.norm_2 = norm(d, **norm_types)
    # The fused output interleaves no heads of q, k and v: it stays whole on
    # every tensor-parallel device.
    self.qkv = layers.Linear(
      d, 3 * d, axes=("embed", None), use_bias=config.qkv_bias, **types
    )
    self.query_norm, self.key_norm = (
      layers.RMSNorm(d, **norm_types) if config.qk_norm else None
      for _ in range(2)
    )
    self.out = layers.Linear(d, d, axes=("heads", "embed"), **types)
    self.up = layers.Linear(d, config.mlp_width, axes=("embed", "mlp"), **types)
    self.down = layers.Linear(
      config.mlp_width, d, axes=("mlp", "embed"), **types
    )
    scale_init = nnx.initializers.constant(config.layer_scale_init)
    self.scale_1 = layers.param(rngs, (d,), ("norm",), scale_init, param_dtype)
    self.scale_2 = layers.param(rngs, (d,), ("norm",), scale_init, param_dtype)

  def __call__(
    self, x: Float[Array, "b t d"], drop: tuple[Array, Array] | None = None
  ) -> Float[Array, "b t d"]:
    """`drop`: rate and noise [2 b] of stochastic depth, or None."""
    rate, noise = (None, (None, None)) if drop is None else drop
    y = self._attention(self.norm_1(x))
    x = x + _drop_path(y * self.scale_1[...].astype(y.dtype), rate, noise[0])
    y = self.down(_gelu(self.up(self.norm_2(x))))
    return x + _drop_path(y * self.scale_2[...].astype(y.dtype), rate, noise[1])

  def _attention(self, x: Array) -> Array:
    q, k, v = jnp.split(self.qkv(x), 3, -1)
    if self.query_norm is not None and self.key_norm is not None:
      q, k = self.query_norm(q), self.key_norm(k)
    q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (q, k, v))
    b, t = x.shape[:2]
    attend = attention.attender(
      None, rows=b, heads=self.num_heads, queries=t, keys=t
    )
    return self.out(attend(q, k, v).reshape(x.shape))


class Connector(nnx.Module):
  """LayerNorm and a two-layer MLP (`mlp1` of InternVL)."""

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    rngs: construct.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    self.norm = layers.LayerNorm(
      in_features, rngs=rngs, eps=1e-5, param_dtype=param_dtype
    )
    self.up = layers.Linear(
      in_features, features, axes=("embed", "mlp"), **types
    )
    self.down = layers.Linear(
      features, features, axes=("mlp", "embed"), **types
    )

  def __call__(self, x: Float[Array, "b v i"]) -> Float[Array, "b v o"]:
    return self.down(_gelu(self.up(self.norm(x))))


def pixel_shuffle(
  grid: Float[Array, "b h w c"], factor: int, *, transposed: bool = False
) -> Float[Array, "b h2 w2 c2"]:
  """Merges `factor` x `factor` neighbors into the channels.

  The channels of out[i, j] are those of grid[fi + 0.., fj + 0..] in raster
  order (InternVL's "v2"). `transposed` swaps the output's rows and columns
  ("v1", kept for comparisons only).
  """
  b, h, w, c = grid.shape
  x = grid.reshape(b, h // factor, factor, w // factor, factor, c)
  x = x.transpose((0, 3, 1, 2, 4, 5) if transposed else (0, 1, 3, 2, 4, 5))
  return x.reshape(*x.shape[:3], factor * factor * c)


def _layers_to_run(config: VisionConfig) -> int:
  """Layers before the output that `select_layer` names; 0 is the embeddings."""
  outputs = config.num_layers + 1
  if not -outputs <= config.select_layer < outputs:
    raise ValueError(
      f"vision.select_layer is {config.select_layer}, but {config.num_layers}"
      f" layers have outputs {-outputs}..{outputs - 1}."
    )
  return config.select_layer % outputs


def _drop_path(x: Array, rate: Array | None, noise: Array | None) -> Array:
  """Zeroes whole samples with probability `rate`, rescales the others."""
  if rate is None or noise is None:
    return x
  keep = 1 - rate
  kept = (noise < keep)[:, None, None]
  return jnp.where(kept, x / keep.astype(x.dtype), 0)


def _gelu(x: Array) -> Array:
  return jax.nn.gelu(x, approximate=False)
