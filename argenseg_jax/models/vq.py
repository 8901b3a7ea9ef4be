"""Multi-scale residual quantizer of VAR's image tokenizer (arXiv 2404.02905).

A latent becomes one token map per scale. Each scale codes what the coarser ones
left over; the codes' rows, resized to the full latent and passed through that
scale's phi, add up to the partial latent. Everything here is float32, whatever
the dtype of the convolutions around it: codes hang on small differences.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from argenseg_jax import construct
from argenseg_jax.kernels.nearest_code import nearest_code
from argenseg_jax.model_config import VQVAEConfig
from argenseg_jax.models import layers, resize

_PRECISION = jax.lax.Precision.HIGHEST


class Quantized(NamedTuple):
  """What quantizing a batch of latents gives."""

  latent: Float[Array, "b h w c"]  # Straight-through: gradient of the input.
  loss: Float[Array, "b"]  # Mean over scales; trains codebook and phis too.
  codes: Int[Array, "b n"]
  vectors: Float[Array, "b n c"]  # What each code stands for, no gradient.


class Quantizer(nnx.Module):
  """Codebook and phis; scales are counted from 0.

  Attributes:
    codebook: float32 [codes c].
    phi_kernel, phi_bias: [phis 3 3 c c] and [phis c];
      phi(x) = (1 - ratio) x + ratio conv(x).
    assignment_cost: [scales codes], added to the squared distances before the
      arg-min. Zero unless training asks for cheap codes (entropy constraint).
  """

  def __init__(
    self,
    config: VQVAEConfig,
    *,
    rngs: construct.Rngs,
    param_dtype: DTypeLike = jnp.float32,
  ):
    c, phis = config.latent_channels, config.num_phis
    self.scales = config.pyramid
    self.phi_ratio = config.phi_ratio
    self.commitment = config.commitment
    self.codebook = layers.param(
      rngs,
      (config.num_codes, c),
      ("codes", "latent"),
      nnx.initializers.normal(1.0),
      param_dtype,
    )
    self.phi_kernel = layers.param(
      rngs,
      (phis, 3, 3, c, c),
      (None, None, None, None, "latent"),
      nnx.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", batch_axis=(0,)
      ),
      param_dtype,
    )
    self.phi_bias = layers.param(
      rngs, (phis, c), (None, "latent"), layers.zeros_init, param_dtype
    )
    self.assignment_cost = layers.Buffer(
      jnp.zeros((len(self.scales), config.num_codes), jnp.float32),
      axes=(None, "codes"),
    )

  @jax.named_scope("vq_codes")
  def __call__(self, latent: Float[Array, "b h w c"]) -> Quantized:
    """Quantizes for training.

    The loss of a scale pulls the latent to the partial latent (weight
    `commitment`) and the partial latent to the latent (weight 1).
    """
    latent = latent.astype(jnp.float32)
    target = jax.lax.stop_gradient(latent)
    codes, vectors, losses = [], [], []
    partial = jnp.zeros_like(latent)
    for codes_k, vectors_k, partial in self._walk(target):
      axes = (1, 2, 3)
      pull = jnp.mean((jax.lax.stop_gradient(partial) - latent) ** 2, axes)
      push = jnp.mean((partial - target) ** 2, axes)
      losses.append(self.commitment * pull + push)
      codes.append(codes_k)
      vectors.append(vectors_k)
    return Quantized(
      latent=latent + jax.lax.stop_gradient(partial - latent),
      loss=jnp.mean(jnp.stack(losses), 0),
      codes=jnp.concatenate(codes, 1),
      vectors=jnp.concatenate(vectors, 1),
    )

  @jax.named_scope("vq_codes")
  def encode(self, latent: Float[Array, "b h w c"]) -> Int[Array, "b n"]:
    """Codes of all scales, int32: nearest by squared L2, the first on ties."""
    walk = self._walk(latent.astype(jnp.float32))
    return jnp.concatenate([codes_k for codes_k, _, _ in walk], 1)

  def lookup(self, codes: Int[Array, "*n"]) -> Float[Array, "*n c"]:
    """Codebook rows, float32. Codes outside the codebook are clamped."""
    return self.codebook[...].astype(jnp.float32).at[codes].get(mode="clip")

  def add_scale(
    self,
    partial: Float[Array, "b h w c"],
    codes_k: Int[Array, "b nk"],
    k: int,
  ) -> Float[Array, "b h w c"]:
    """The partial latent once scale `k` has been added."""
    side, full = self.scales.sides[k], self.scales.latent_side
    x = self.lookup(codes_k).reshape(-1, side, side, partial.shape[-1])
    if side != full:
      x = resize.resize_with(resize.bicubic_matrix(side, full), x)
    return partial + self._phi(x, k)

  def next_input(
    self, partial: Float[Array, "b h w c"], k: int
  ) -> Float[Array, "b nk c"]:
    """What predicts scale `k + 1`: the partial latent after scale `k`, there.

    Float32, also for the language model's code embedding.
    """
    return self.vectors_at(partial, k + 1)

  def sum_scales(
    self, codes: Int[Array, "b n"], num_scales: int | None = None
  ) -> Float[Array, "b h w c"]:
    """Partial latent of the first `num_scales` scales (default all)."""
    partial = self._zeros(codes)
    for k, codes_k in enumerate(self.scales.split(codes)[:num_scales]):
      partial = self.add_scale(partial, codes_k, k)
    return partial

  def prefixes(self, codes: Int[Array, "b n"]) -> Float[Array, "b k h w c"]:
    """Partial latents after each scale."""
    partial, partials = self._zeros(codes), []
    for k, codes_k in enumerate(self.scales.split(codes)):
      partial = self.add_scale(partial, codes_k, k)
      partials.append(partial)
    return jnp.stack(partials, 1)

  def scale_inputs(self, codes: Int[Array, "b n"]) -> Float[Array, "b m c"]:
    """Teacher-forcing inputs of scales 1.., one per code of those scales."""
    partial = self._zeros(codes)
    inputs = [jnp.zeros((codes.shape[0], 0, partial.shape[-1]), jnp.float32)]
    for k, codes_k in enumerate(self.scales.split(codes)[:-1]):
      partial = self.add_scale(partial, codes_k, k)
      inputs.append(self.next_input(partial, k))
    return jnp.concatenate(inputs, 1)

  def count_codes(
    self, codes: Int[Array, "b n"], valid: Bool[Array, "b"] | None = None
  ) -> Int[Array, "scales codes"]:
    """How often each scale of a batch, of its `valid` rows, uses each code."""
    num_codes = self.codebook.shape[0]
    if valid is not None:  # The others get a number that is not counted.
      codes = jnp.where(valid[:, None], codes, num_codes)
    return jnp.stack(
      [
        jnp.bincount(codes_k.reshape(-1), length=num_codes)
        for codes_k in self.scales.split(codes)
      ]
    )

  def _walk(self, latent: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Yields each scale's codes, the vectors they stand for, the partial sum.

    Gradients reach codebook and phis through the partial sums only.
    """
    partial = jnp.zeros_like(latent)
    for k in range(len(self.scales)):
      residual = jax.lax.stop_gradient(latent - partial)
      vectors = self.vectors_at(residual, k)
      codes = self.nearest(vectors, k)
      partial = self.add_scale(partial, codes, k)
      yield codes, vectors, partial

  def nearest(
    self, vectors: Float[Array, "b n c"], k: int
  ) -> Int[Array, "b n"]:
    """Cheapest code of each vector: squared distance plus assignment cost."""
    b, n, c = vectors.shape
    codes = nearest_code(
      vectors.reshape(b * n, c),
      self.codebook[...],
      cost=self.assignment_cost[...][k],
    )
    return codes.reshape(b, n)

  def vectors_at(self, x: Array, k: int) -> Array:
    """`x` area-resized to scale `k`, as [b n c]."""
    side, full = self.scales.sides[k], self.scales.latent_side
    if side != full:
      x = resize.resize_with(resize.area_matrix(full, side), x)
    return x.reshape(x.shape[0], side * side, -1)

  def _phi(self, x: Array, k: int) -> Array:
    index = self.scales.phi_index[k]
    y = jax.lax.conv_general_dilated(
      x,
      self.phi_kernel[...][index].astype(jnp.float32),
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=_PRECISION,
    )
    y += self.phi_bias[...][index].astype(jnp.float32)
    return (1 - self.phi_ratio) * x + self.phi_ratio * y

  def _zeros(self, codes: Array) -> Array:
    side = self.scales.latent_side
    shape = (codes.shape[0], side, side, self.codebook.shape[1])
    return jnp.zeros(shape, jnp.float32)
