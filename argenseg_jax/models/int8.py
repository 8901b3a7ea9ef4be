"""A decoder's weights in eight bits, for passes that wait for memory.

A matrix is kept as eight-bit numbers with one float32 scale for each output
channel (each word, in the head); products take the numbers in the dtype of the
activations, and the scale follows them. Everything else stays as it was.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from argenseg_jax.models import layers
from argenseg_jax.models.llm import Decoder

Weights = Literal["int8", "float8_e4m3fn"]


class Scale(nnx.Param):
  """Float32 scales of eight-bit numbers; they are used as they are."""


class QuantizedLinear(nnx.Module):
  """y = (x kernel) * scale + bias, with an eight-bit kernel [in out].

  Args:
    linear: of any number of stacked layers.
    weights: dtype of the kernel.
  """

  def __init__(self, linear: layers.Linear, weights: Weights):
    self.dtype = linear.dtype
    axes = linear.kernel.get_metadata("axes")
    kernel, scale = eight_bits(linear.kernel[...], -2, weights)
    self.kernel = nnx.Param(kernel, axes=axes)
    self.scale = Scale(scale, axes=(*axes[:-2], axes[-1]))
    self.bias = linear.bias

  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    y = jnp.matmul(
      x.astype(self.dtype),
      self.kernel[...].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    y = (y * self.scale[...]).astype(self.dtype)
    return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def quantize(llm: Decoder, weights: Weights) -> None:
  """Turns a decoder's matrices and its head into eight-bit ones, in place.

  For inference: such weights cannot be trained or saved.

  Args:
    llm: with its layers stacked or apart.
    weights: one of `Weights`.

  Raises:
    ValueError: a decoder that has them already.
  """
  if llm.head_scale is not None:
    raise ValueError("this decoder's weights are quantized already.")
  apart = isinstance(llm.layers, nnx.List)
  stacks: Any = llm.layers if apart else [llm.layers]
  for layer in stacks:
    for part in (layer.attention, layer.mlp):
      for name, child in list(vars(part).items()):
        if isinstance(child, layers.Linear):
          setattr(part, name, QuantizedLinear(child, weights))
  table = llm.embedding if llm.untied_head is None else llm.untied_head
  axes = table.get_metadata("axes")
  rows, scale = eight_bits(table[...], -1, weights)
  llm.head_scale = nnx.data(Scale(scale, axes=axes[:1]))
  table = nnx.Param(rows, axes=axes)
  if llm.untied_head is None:
    llm.embedding = table
  else:
    llm.untied_head = table


def eight_bits(
  matrix: Float[Array, "..."], axis: int, weights: Weights
) -> tuple[Array, Array]:
  """Eight-bit numbers and the float32 scales that they multiply.

  Args:
    matrix: any matrix, or a stack of them.
    axis: summed over in products; the scales lack it.
    weights: one of `Weights`.
  """
  return _eight_bits(matrix, axis, jnp.dtype(weights))


@jax.jit(static_argnums=(1, 2))
def _eight_bits(matrix, axis, dtype):
  matrix = matrix.astype(jnp.float32)
  whole = jnp.issubdtype(dtype, jnp.integer)
  largest = (jnp.iinfo if whole else jnp.finfo)(dtype).max
  peak = jnp.max(jnp.abs(matrix), axis, keepdims=True)
  scale = jnp.where(peak == 0, 1.0, peak / float(largest))
  numbers = matrix / scale
  if whole:
    numbers = jnp.round(numbers)
  return numbers.astype(dtype), jnp.squeeze(scale, axis)
