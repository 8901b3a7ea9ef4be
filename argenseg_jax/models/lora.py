"""Low-rank adapters: y = x W + (alpha / rank) x A B, with W frozen.

Adapters sit on the projections of a model whose base weights keep their paths,
their dtype (float32, bfloat16) or their eight bits. B starts at zero, so fresh
adapters give the base's outputs exactly.
"""

import fnmatch
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from argenseg_jax import construct
from argenseg_jax.config import ConfigError, LoRAConfig
from argenseg_jax.models import int8, layers


class Adapter(nnx.Param):
  """A or B of an adapted projection; everything else is the base's."""


class _Adapted(nnx.Module):
  """What both kinds of adapted projections share."""

  scaling: float
  lora_a: Adapter  # [in rank], float32
  lora_b: Adapter  # [rank out], float32

  def _add_adapter(
    self, config: LoRAConfig, rngs: construct.Rngs, kernel: nnx.Param
  ):
    """For a kernel [in out], or a stack of them."""
    *stack, i, o = kernel.shape
    *names, axis_in, axis_out = kernel.get_metadata("axes")
    self.scaling = config.alpha / config.rank
    a = _uniform(rngs.params(), (*stack, i, config.rank))
    b = jnp.zeros((*stack, config.rank, o), jnp.float32)
    self.lora_a = Adapter(a, axes=(*names, axis_in, None))
    self.lora_b = Adapter(b, axes=(*names, None, axis_out))

  def _delta(self, x: Float[Array, "... i"], dtype) -> Float[Array, "... o"]:
    x = x.astype(dtype) @ self.lora_a[...].astype(dtype)
    return self.scaling * (x @ self.lora_b[...].astype(dtype))

  def low_rank(self) -> Float[Array, "... i o"]:
    """What merging adds to the kernel, float32."""
    product = jnp.matmul(
      self.lora_a[...].astype(jnp.float32),
      self.lora_b[...].astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    return self.scaling * product


class AdaptedLinear(layers.Linear, _Adapted):
  """A `layers.Linear` with an adapter; its kernel and bias are shared."""

  def __init__(
    self, linear: layers.Linear, config: LoRAConfig, rngs: construct.Rngs
  ):
    self.dtype, self.kernel, self.bias = (
      linear.dtype,
      linear.kernel,
      linear.bias,
    )
    self._add_adapter(config, rngs, linear.kernel)

  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    return super().__call__(x) + self._delta(x, self.dtype)


class _Merged(layers.Linear):
  """A `layers.Linear` whose kernel holds its adapter's update too."""

  def __init__(self, linear: AdaptedLinear):
    self.dtype, self.bias = linear.dtype, linear.bias
    kernel = linear.kernel
    merged = kernel[...].astype(jnp.float32) + linear.low_rank()
    self.kernel = kernel.replace(merged.astype(kernel.dtype))


class AdaptedQuantizedLinear(int8.QuantizedLinear, _Adapted):
  """An `int8.QuantizedLinear` with an adapter."""

  def __init__(
    self, linear: int8.QuantizedLinear, config: LoRAConfig, rngs: construct.Rngs
  ):
    self.dtype, self.kernel, self.bias = (
      linear.dtype,
      linear.kernel,
      linear.bias,
    )
    self.scale = linear.scale
    self._add_adapter(config, rngs, linear.kernel)

  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    return super().__call__(x) + self._delta(x, self.dtype)


def adapt(model: nnx.Module, config: LoRAConfig, *, seed: int = 0) -> None:
  """Gives the projections that `config.targets` name an adapter, in place.

  Args:
    model: with stacked layers, of base weights or eight-bit ones.
    config: of the adapters; rank 0 changes nothing.
    seed: of A; B is zero.

  Raises:
    ConfigError: a pattern that names no projection, or an adapter already.
  """
  if not config.rank:
    return
  rngs = construct.Rngs(seed)
  used = set()
  for path, parent, name, linear in projections(model):
    matching = [p for p in config.targets if fnmatch.fnmatchcase(path, p)]
    used.update(matching)
    if not matching:
      continue
    if isinstance(linear, _Adapted):
      raise ConfigError(f"{path} has an adapter already.")
    if isinstance(linear, int8.QuantizedLinear):
      adapted = AdaptedQuantizedLinear(linear, config, rngs)
    else:
      adapted = AdaptedLinear(linear, config, rngs)
    setattr(parent, name, adapted)
  for pattern in config.targets:
    if pattern not in used:
      raise ConfigError(
        f"config key 'lora.targets' names {pattern!r}, which matches no "
        "projection of the model; patterns look like 'llm.layers.attention.*'."
      )


def merge(model: nnx.Module) -> None:
  """Adds every adapter to the kernel that it adapts and removes it, in place.

  Raises:
    ValueError: an eight-bit kernel, which cannot hold the sum.
  """
  for path, parent, name, linear in projections(model):
    if isinstance(linear, AdaptedQuantizedLinear):
      raise ValueError(f"{path} has eight-bit weights; merge into the base.")
    if isinstance(linear, AdaptedLinear):
      setattr(parent, name, _Merged(linear))


def projections(
  model: nnx.Module,
) -> Iterator[
  tuple[str, nnx.Module, str, layers.Linear | int8.QuantizedLinear]
]:
  """(dotted path, parent, its attribute, projection) of every projection, in
  the order of paths."""
  found = []
  for path, node in nnx.iter_modules(model):
    for name, child in vars(node).items():
      if isinstance(child, (layers.Linear, int8.QuantizedLinear)):
        found.append((".".join(map(str, (*path, name))), node, name, child))
  yield from sorted(found, key=lambda entry: entry[0])


def trainable_filter(config: LoRAConfig, state: Any):
  """An NNX filter for adapters and the parts that train in full.

  Raises:
    ConfigError: a pattern of `config.train` that matches no parameter.
  """
  paths = {
    ".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)
  }
  full = set()
  for pattern in config.train:
    matching = [
      path
      for name, path in paths.items()
      if fnmatch.fnmatchcase(name, pattern)
      or fnmatch.fnmatchcase(name, f"{pattern}.*")
    ]
    if not matching:
      raise ConfigError(
        f"config key 'lora.train' names {pattern!r}, which is no part of the "
        "model."
      )
    full.update(tuple(map(str, path)) for path in matching)

  def trains(path, value):
    if isinstance(value, Adapter):
      return True
    is_param = isinstance(value, nnx.Param)
    return is_param and tuple(map(str, path)) in full

  return trains


def without_adapters(state: Any) -> Any:
  """What trains in full, of adapters and that."""
  return nnx.from_flat_state(
    [
      (path, leaf)
      for path, leaf in nnx.to_flat_state(state)
      if not isinstance(leaf, Adapter)
    ]
  )


def fingerprint(state: Any) -> str:
  """Names the values of a base model: equal whatever mesh it lives on, and
  whether it is kept in float32 or bfloat16.

  Args:
    state: of a whole model, without adapters and before it is quantized.
  """
  sums = {
    ".".join(map(str, path)): _checksum(leaf[...])
    for path, leaf in nnx.to_flat_state(state)
  }
  content = sorted(
    f"{name} {'x'.join(map(str, shape))} {int(a):08x}{int(b):08x}"
    for name, (shape, a, b) in sums.items()
  )
  return hashlib.sha256("\n".join(content).encode()).hexdigest()[:32]


def _checksum(x: Array) -> tuple[tuple[int, ...], Array, Array]:
  return (x.shape, *_sums(x))


@jax.jit
def _sums(x: Array) -> tuple[Array, Array]:
  """Two 32-bit sums that see every value and where it stands.

  Sums of integers: no order of addition changes them.
  """
  if jnp.issubdtype(x.dtype, jnp.floating):
    x = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    step = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = place * jnp.uint32(x.shape[axis]) + step
  mixed = _mixed(x.astype(jnp.uint32) ^ _mixed(place))
  return (
    jnp.sum(mixed, dtype=jnp.uint32),
    jnp.sum(_mixed(mixed + jnp.uint32(0x9E3779B9)), dtype=jnp.uint32),
  )


def _mixed(x: Array) -> Array:
  """Spreads every bit over the whole word (murmur3's finalizer)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
  """As PyTorch starts A: within 1 / sqrt(in) of zero."""
  bound = shape[-2] ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
