"""Per-generation facts of TPU chips, and the block sizes that follow."""

from collections.abc import Callable
from typing import NamedTuple

from argenseg_jax.kernels import dispatch

_MIB = 2**20


class Chip(NamedTuple):
  """What the kernels need to know of a TPU generation."""

  topology: str  # The smallest one that the TPU compiler accepts.
  vmem: int  # Bytes a kernel may use by default.


CHIPS = {
  "v5e": Chip("v5e:2x2", 16 * _MIB),
  "v5p": Chip("v5p:2x2x1", 16 * _MIB),
  "v6e": Chip("v6e:2x2", 32 * _MIB),
  "tpu7x": Chip("tpu7x:2x2x1", 32 * _MIB),
}

# JAX's `device_kind` of each chip.
_KINDS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
}


class Blocks(NamedTuple):
  """Block of the matrix of logits: words or codes x tokens."""

  words: int
  tokens: int


def blocks(
  words: int,
  tokens: int,
  bytes_needed: Callable[[Blocks], int],
  *,
  outer: str = "tokens",
) -> Blocks:
  """The best block that fits the chip in use.

  The side that stays in VMEM while the other one streams past (`outer`) comes
  first, up to 512, because it decides how often the other matrix is read; then
  the larger block. A side is a power of two from 128 on, or the whole length if
  that is shorter; words may go down to 32 where nothing else fits. Unknown
  chips are taken for the smallest one. The compiler keeps a share of VMEM.
  """
  kind = dispatch.target().kind
  budget = 0.85 * CHIPS[_KINDS.get(kind, "v5e")].vmem

  def value(block):
    side = getattr(block, outer)
    return min(side, 512), block.words * block.tokens

  for least in (128, 64, 32):
    sizes = [
      Blocks(min(w, words), min(t, tokens))
      for t in (1024, 512, 256, 128)
      for w in (1024, 512, 256, 128, 64, 32)
      if w >= least
    ]
    fitting = [s for s in sizes if bytes_needed(s) <= budget]
    if fitting:
      return max(fitting, key=value)
  return sizes[-1]  # Let the compiler judge.
