"""Published facts of accelerators, and the block sizes that follow."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from argenseg_jax.kernels import dispatch

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


class Chip(NamedTuple):
  """An accelerator; all rates and sizes are those of a whole chip."""

  platform: Literal["tpu", "gpu"]
  topology: str  # The smallest one that the compiler accepts.
  scratch: int  # Bytes a kernel may use by default: VMEM or shared memory.
  flops: float  # Dense bfloat16 FLOP/s.
  hbm: int  # Bytes.
  bandwidth: float  # Bytes/s from and to HBM.
  links: float  # Bytes/s to other chips, both directions (ICI or NVLink).
  devices: int = 1  # JAX devices a chip; they share all of the above.
  # Bytes/s to other slices, per chip (data-center network); None: not given.
  dcn: float | None = None


# TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, "System architecture";
# memory in GiB, ICI in both directions, as those pages have it since 2026; the
# DCN of v5e is 6.4 Tbit/s for a pod of 256 chips, that of v5p 50 Gbit/s a chip.
# `scratch` is the compiler's own limit, found by compiling.
# GPUs: NVIDIA's data sheets of the SXM boards. They print 1,979 TFLOP/s with
# sparsity, which is twice the dense rate. A thread block may use 227 KiB.
CHIPS = {
  "v5e": Chip(
    "tpu", "v5e:2x2", 16 * _MIB, 197e12, 16 * _GIB, 819e9, 400e9, 1, 3.125e9
  ),
  "v5p": Chip(
    "tpu", "v5p:2x2x1", 16 * _MIB, 459e12, 95 * _GIB, 2765e9, 1200e9, 1, 6.25e9
  ),
  "v6e": Chip("tpu", "v6e:2x2", 32 * _MIB, 918e12, 32 * _GIB, 1638e9, 800e9),
  "tpu7x": Chip(
    "tpu", "tpu7x:2x2x1", 32 * _MIB, 2307e12, 192 * _GIB, 7380e9, 1200e9, 2
  ),
  "h100": Chip("gpu", "1x1x1", 227 * _KIB, 989.5e12, 80 * 10**9, 3350e9, 900e9),
  "h200": Chip(
    "gpu", "1x1x1", 227 * _KIB, 989.5e12, 141 * 10**9, 4800e9, 900e9
  ),
}
TPUS = {name: chip for name, chip in CHIPS.items() if chip.platform == "tpu"}

# JAX's `device_kind` of each; other boards of a GPU differ in their rates.
_KINDS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
}


def kind_of(name: str) -> str:
  """The last of JAX's device kinds for a key of `CHIPS`."""
  return [kind for kind, chip in _KINDS.items() if chip == name][-1]


def name_of(device_kind: str) -> str | None:
  """Key of `CHIPS` for JAX's `device_kind`; None for any other device."""
  return _KINDS.get(device_kind)


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
  chip = TPUS.get(name_of(dispatch.target().kind) or "", TPUS["v5e"])
  budget = 0.85 * chip.scratch

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
