"""Small layers that the models share: projections, norms, rope, attention.

Parameters carry logical axis names in their `axes` metadata, one per dimension;
`sharding.py` maps the names to mesh axes. Parameters are kept in `param_dtype`
and used in `dtype`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from argenseg_jax import construct, sharding
from argenseg_jax.kernels import dispatch

Axes = tuple[str | None, ...]
Initializer = Callable[..., Array]

fan_in_init = nnx.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal"
)
zeros_init = nnx.initializers.zeros_init()
ones_init = nnx.initializers.ones_init()


def param(
  rngs: construct.Rngs,
  shape: Sequence[int],
  axes: Axes,
  init: Initializer = fan_in_init,
  dtype: DTypeLike = jnp.float32,
) -> nnx.Param:
  """A parameter with one logical axis name per dimension."""
  if len(shape) != len(axes):
    raise ValueError(f"{len(axes)} axis names for shape {tuple(shape)}")
  if construct.is_abstract():
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)
  return nnx.Param(init(rngs.params(), tuple(shape), dtype), axes=axes)


class Buffer(nnx.Variable):
  """An array that belongs to the model and is saved, but never trained."""


class Linear(nnx.Module):
  """y = x kernel + bias, with kernel [in out]."""

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rngs: construct.Rngs,
    axes: Axes,
    use_bias: bool = True,
    init: Initializer = fan_in_init,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    self.dtype = dtype
    self.kernel = param(
      rngs, (in_features, out_features), axes, init, param_dtype
    )
    self.bias = (
      param(rngs, (out_features,), axes[-1:], zeros_init, param_dtype)
      if use_bias
      else None
    )

  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    if dispatch.target().platform == "cpu":
      # Of two axes, so that x is not transposed for the kernel's gradient. (A
      # step of 1B on v5e-8 would take 13 % more memory that way.)
      y = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
    else:
      y = x @ kernel
    return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Conv(nnx.Module):
  """2-D convolution over [b h w c], kernel [kh kw in out]."""

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_side: int,
    *,
    rngs: construct.Rngs,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    axes: Axes = (None, None, None, "conv"),
    init: Initializer = fan_in_init,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    self.dtype = dtype
    self.stride = stride
    low, high = (padding, padding) if isinstance(padding, int) else padding
    self.padding = ((low, high), (low, high))
    shape = (kernel_side, kernel_side, in_features, out_features)
    self.kernel = param(rngs, shape, axes, init, param_dtype)
    self.bias = param(rngs, (out_features,), axes[-1:], zeros_init, param_dtype)

  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      self.kernel[...].astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding=self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis, in float32."""

  def __init__(
    self,
    features: int,
    *,
    rngs: construct.Rngs,
    eps: float,
    axes: Axes = ("norm",),
    param_dtype: DTypeLike = jnp.float32,
  ):
    self.eps = eps
    self.scale = param(rngs, (features,), axes, ones_init, param_dtype)

  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm over the last axis, in float32."""

  def __init__(
    self,
    features: int,
    *,
    rngs: construct.Rngs,
    eps: float,
    axes: Axes = ("norm",),
    param_dtype: DTypeLike = jnp.float32,
  ):
    self.eps = eps
    self.scale = param(rngs, (features,), axes, ones_init, param_dtype)
    self.bias = param(rngs, (features,), axes, zeros_init, param_dtype)

  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, -1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    y = y * self.scale[...].astype(jnp.float32)
    return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class GroupNorm(nnx.Module):
  """Group norm over space and channel groups of [b h w c], in float32."""

  def __init__(
    self,
    features: int,
    num_groups: int,
    *,
    rngs: construct.Rngs,
    eps: float = 1e-6,
    param_dtype: DTypeLike = jnp.float32,
  ):
    if features % num_groups:
      raise ValueError(f"{features} channels do not form {num_groups} groups")
    self.eps = eps
    self.num_groups = num_groups
    self.scale = param(rngs, (features,), ("norm",), ones_init, param_dtype)
    self.bias = param(rngs, (features,), ("norm",), zeros_init, param_dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    y = x.astype(jnp.float32)
    y -= self._group_mean(y)
    scale = jax.lax.rsqrt(self._group_mean(y * y) + self.eps)
    y = y * (scale * self.scale[...].astype(jnp.float32))
    return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)

  def _group_mean(self, x):
    """Group means, repeated for each channel: [b 1 1 c].

    Means of channels first: XLA's CPU backend is slow to reduce over a
    reshaped channel axis.
    """
    means = jnp.mean(x, (1, 2)).reshape(len(x), self.num_groups, -1)
    means = jnp.broadcast_to(jnp.mean(means, -1, keepdims=True), means.shape)
    return means.reshape(len(x), 1, 1, -1)


def rope_frequencies(
  head_dim: int,
  theta: float,
  *,
  scaling: str = "none",
  factor: float = 1.0,
  max_positions: int = 0,
  length: int = 0,
) -> np.ndarray:
  """Inverse frequencies of rotary embeddings, float32 [head_dim / 2].

  Dynamic NTK scaling enlarges the base once `length` (the longest sequence that
  the table has served) passes `max_positions`.
  """
  if scaling == "dynamic" and length > max_positions:
    stretch = factor * length / max_positions - (factor - 1)
    theta = theta * stretch ** (head_dim / (head_dim - 2))
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  frequencies = 1.0 / (np.float64(theta) ** exponents)
  if scaling == "linear":
    frequencies = frequencies / factor
  return frequencies.astype(np.float32)


def rotate(
  x: Float[Array, "b t heads hd"],
  positions: Int[Array, "b t"],
  frequencies: np.ndarray,
) -> Float[Array, "b t heads hd"]:
  """Applies rotate-half rotary embeddings in float32.

  Only the first 2 * len(frequencies) dimensions of each head rotate.
  """
  width = 2 * len(frequencies)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  a, b = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
  return jnp.concatenate((rotated.astype(x.dtype), x[..., width:]), -1)


def stack(
  make: Callable[[construct.Rngs], nnx.Module], count: int, rngs: construct.Rngs
):
  """One module whose parameters hold `count` layers along a leading axis.

  The leading axis is named "layers". Use it through `layer_scan`.
  """

  @nnx.vmap(in_axes=(0,), out_axes=0)
  def create(key):
    return make(construct.Rngs(key))

  stacked = create(jax.random.split(rngs.params(), count))
  for _, leaf in nnx.iter_graph(stacked):
    if isinstance(leaf, nnx.Param):
      leaf.set_metadata(axes=("layers", *leaf.get_metadata("axes")))
  return stacked


def first_of(stacked: nnx.Pytree, count: int) -> nnx.Pytree:
  """The first `count` layers of `stack` or `unstack`."""
  if isinstance(stacked, nnx.List):
    return nnx.List(stacked[:count])
  graph, state = nnx.split(stacked)
  return nnx.merge(graph, jax.tree.map(lambda p: p[:count], state))


def unstack(stacked: nnx.Pytree) -> nnx.Pytree:
  """The layers of `stack` one by one, for `layer_scan`.

  See `dispatch.copies_stacks` for where that is worth it.
  """
  if isinstance(stacked, nnx.List):
    return stacked
  graph, state = nnx.split(stacked)
  leaves, tree = jax.tree.flatten(state)
  return nnx.List(
    nnx.merge(graph, tree.unflatten([_layer(x, i) for x in leaves]))
    for i in range(leaves[0].shape[0])
  )


def _layer(x: Array, i: int) -> Array:
  """x[i]; outside of programs, all layers of a stack share a compiled one."""
  return x[i] if isinstance(x, jax.core.Tracer) else _dynamic_layer(x, i)


@jax.jit
def _dynamic_layer(x: Array, i: Int[Array, ""]) -> Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def layer_scan(
  stacked: nnx.Pytree,
  step: Callable,
  carry,
  xs=None,
  *,
  remat_policy: Callable | bool | None = False,
):
  """Scans `carry, y = step(layer, carry, x)` over the layers of `stacked`.

  Where parameters are split (`sharding.gathers`), each layer's are gathered
  just before it runs, and once more in the backward pass.

  Args:
    stacked: from `stack`, or `unstack` (then it is no loop, and nothing is
      recomputed or gathered: for inference on one device).
    step: pure apart from reading its layer.
    carry: any pytree.
    xs: pytree with a leading layer axis, or None.
    remat_policy: False keeps activations; None recomputes all of them; else a
      policy of `jax.checkpoint_policies`.
  """
  if isinstance(stacked, nnx.List):
    outputs = []
    for i, layer in enumerate(stacked):
      carry, y = step(layer, carry, jax.tree.map(lambda x, i=i: x[i], xs))
      outputs.append(y)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)
  graph, state = nnx.split(stacked)

  def body(carry, inputs):
    layer_state, x = inputs
    layer = nnx.merge(graph, sharding.gathered(layer_state))
    return step(layer, carry, x)

  if remat_policy is False and sharding.gathers():
    remat_policy = _all_but_gathered
  if not isinstance(remat_policy, bool):
    body = jax.checkpoint(body, policy=remat_policy, prevent_cse=False)
  # A loop over few layers costs a CPU more (a fifth of a small model's step)
  # than it saves in compilation.
  depth = jax.tree.leaves(state)[0].shape[0]
  return jax.lax.scan(body, carry, (state, xs), unroll=depth <= 4)


def _all_but_gathered(primitive, *_, **__) -> bool:
  """Remat policy: whole parameters of all layers at once would not fit."""
  return primitive.name != "all_gather"


def sincos_2d(side: int, width: int, grid_side: int) -> np.ndarray:
  """2-D sine-cosine positions, float32 [side * side, width], raster order.

  Cells are placed at their centers on a grid of `grid_side` cells, so maps of
  different sides share one coordinate system. Wavelengths run from 2 cells to
  twice the grid: slower ones would make all cells look alike.
  """
  quarter = width // 4
  centers = (np.arange(side) + 0.5) * grid_side / side
  steps = np.arange(quarter) / max(quarter - 1, 1)
  frequencies = np.pi / grid_side**steps
  angles = centers[:, None] * frequencies
  axis = np.concatenate((np.sin(angles), np.cos(angles)), -1)  # [side, 2q]
  rows = np.repeat(axis[:, None], side, 1)
  columns = np.repeat(axis[None], side, 0)
  table = np.concatenate((rows, columns), -1).reshape(side * side, -1)
  padded = np.zeros((side * side, width), np.float32)
  padded[:, : table.shape[1]] = table
  return padded
