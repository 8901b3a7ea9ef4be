"""Resizing feature maps by one matrix for each axis."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def area_matrix(source: int, target: int) -> np.ndarray:
  """Adaptive average pooling along one axis, float32 [target source].

  Bins overlap where the sides do not divide (PyTorch's `area` mode).
  """
  matrix = np.zeros((target, source), np.float32)
  for i in range(target):
    start, stop = i * source // target, -(-(i + 1) * source // target)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix


def bicubic_matrix(source: int, target: int, a: float = -0.75) -> np.ndarray:
  """PyTorch's bicubic resize along one axis, float32 [target source].

  Half-pixel centers, no antialiasing, border samples repeated.
  """
  matrix = np.zeros((target, source), np.float64)
  for i in range(target):
    center = (i + 0.5) * source / target - 0.5
    base = int(np.floor(center))
    for tap in range(-1, 3):
      x = abs(center - (base + tap))
      if x <= 1:
        weight = ((a + 2) * x - (a + 3)) * x * x + 1
      elif x < 2:
        weight = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
      else:
        weight = 0.0
      matrix[i, min(max(base + tap, 0), source - 1)] += weight
  return matrix.astype(np.float32)


def resize_with(
  matrix: np.ndarray, x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c"]:
  """Applies one axis' resize matrix to both spatial axes, in x's dtype.

  Accelerators would round float32 factors by default; resizing is cheap and
  decides which code is nearest, so it asks for full precision.
  """
  m = jnp.asarray(matrix, x.dtype)
  return jnp.einsum(
    "ih,bhwc,jw->bijc", m, x, m, precision=jax.lax.Precision.HIGHEST
  )
