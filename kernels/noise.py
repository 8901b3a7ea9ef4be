"""Gumbel noise as a pure function of (seed, row, column).

Kernels draw their own noise block by block, shards draw theirs, and all of them
get the same numbers: each is threefry-2x32 of its place. Only 32-bit integer
operations are used, so the same code runs inside Pallas kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def make_seed(
  key: jax.Array,
  *,
  first_row: jax.Array | int = 0,
  first_column: jax.Array | int = 0,
) -> jax.Array:
  """int32 [4]: two words of a random key, and where a shard begins.

  Args:
    key: JAX random key of any kind.
    first_row: what row 0 of this shard is in the whole.
    first_column: likewise.
  """
  words = jax.random.bits(key, (2,), jnp.uint32)
  place = jnp.stack([jnp.int32(first_row), jnp.int32(first_column)])
  return jnp.concatenate([lax.bitcast_convert_type(words, jnp.int32), place])


def gumbel(seed, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Float32 standard Gumbel noise at int32 places; shapes broadcast.

  `seed` is from `make_seed`, or a kernel's reference to it.
  """
  rows, columns = jnp.broadcast_arrays(rows + seed[2], columns + seed[3])
  bits = _threefry((seed[0], seed[1]), rows, columns)
  # 23 bits, centered: never 0 or 1, exact in float32.
  uniform = (
    lax.shift_right_logical(bits, np.int32(9)).astype(jnp.float32) + 0.5
  ) * np.float32(2.0**-23)
  return -jnp.log(-jnp.log(uniform))


def _threefry(seed, x, y):
  """First word of threefry-2x32 with 20 rounds (Salmon et al., 2011)."""
  keys = (*seed, seed[0] ^ seed[1] ^ np.int32(0x1BD11BDA))
  x, y = x + keys[0], y + keys[1]
  for group in range(5):
    for amount in _ROTATIONS[group % 2]:
      x = x + y
      y = (y << np.int32(amount)) | lax.shift_right_logical(
        y, np.int32(32 - amount)
      )
      y = y ^ x
    x = x + keys[(group + 1) % 3]
    y = y + keys[(group + 2) % 3] + np.int32(group + 1)
  return x
