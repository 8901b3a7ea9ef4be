"""Matrix products and block sizes that every implementation shares."""

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
