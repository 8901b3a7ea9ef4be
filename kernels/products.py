"""Matrix products and block sizes that every implementation shares."""

from typing import cast

import jax
import jax.numpy as jnp
from jax import lax


def product(
  a: jax.Array, b: jax.Array, *, contract: tuple[int, int] = (1, 0)
) -> jax.Array:
  """Product of two matrices over one axis of each, in float32.

  Float32 operands are multiplied exactly (no TF32, no bfloat16 passes);
  bfloat16 operands accumulate in float32.
  """
  exact = a.dtype == jnp.float32
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def row_products(a, b) -> jax.Array:
  """a @ b.T in float32, for arrays or kernel references [rows columns].

  Adds up slices of the columns, so that a kernel's compiler needs scratch
  memory for a slice only (it splits float32 operands into bfloat16 parts).
  """
  slices = column_slices(a.shape[1])
  parts = (product(a[:, c], b[:, c], contract=(1, 1)) for c in slices)
  return cast(jax.Array, sum(parts))  # At least one: never the int 0.


def column_slices(length: int) -> list[slice]:
  """Slices of at most 512 columns that cover `length`."""
  return [slice(i, min(i + 512, length)) for i in range(0, length, 512)]


def at_least_eight_rows(x: jax.Array) -> jax.Array:
  """Pads [rows ...] with zeros: TPU kernels cannot multiply a single row."""
  missing = max(8 - x.shape[0], 0)
  return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))


def even_blocks(length: int, largest: int) -> tuple[int, int]:
  """Number and size of the fewest equal blocks of at most `largest`.

  Their total passes `length` by less than the number of blocks.
  """
  count = -(-length // max(largest, 1))
  return count, -(-length // count)


def block_elements(platform: str) -> int:
  """Float32 intermediates that a blocked XLA program may hold at a time.

  On a CPU a block should stay in cache (2 MiB); an accelerator needs blocks
  that fill it (64 MiB).
  """
  return 2**19 if platform == "cpu" else 2**24
