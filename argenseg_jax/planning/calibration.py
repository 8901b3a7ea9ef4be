"""How far from published rates real programs stay: measured, and published.

A bound at published rates says what cannot be beaten; these shares say what one
card reached, so that a bound can be read beside them.
"""

from typing import NamedTuple

from argenseg_jax.config import TrainConfig
from argenseg_jax.kernels.chips import CHIPS, Chip
from argenseg_jax.planning.counted import Work


class Shares(NamedTuple):
  """Achieved share of a published rate, by kind of work; 0 to 1.

  Attributes:
    products: matrix products with weights, of peak FLOP/s.
    loss: the loss kernel's four products, likewise.
    attention: causal attention, forward and gradient; FLOPs counted as in
      `models/flops.py`, so without the masked half.
    memory: a large copy, of memory bandwidth.
  """

  products: float
  loss: float
  attention: float
  memory: float


_H100 = CHIPS["h100"]
_LOSS = 4 * 2 * 8192 * 96653 * 4096  # FLOPs of the measured loss.
_ATTENTION = 3 * 2 * 2 * 4 * 32 * 1024 * 512 * 128  # Of the measured attention.
# Two H100s of the same name, a day apart (docs/benchmarks.md, "One H100"): a
# product of 8,192 at 616 and 787 TFLOP/s, the loss of 8,192 tokens in 44.8 and
# 39.6 ms, attention of 4 rows of 1,024 with its gradient in 1.45 ms and a copy
# at 2.48 TB/s. The last two were timed on the slower card alone.
H100 = tuple(
  Shares(
    products=products / _H100.flops,
    loss=_LOSS / seconds / _H100.flops,
    attention=_ATTENTION / 1.45e-3 / _H100.flops,
    memory=2.48e12 / _H100.bandwidth,
  )
  for products, seconds in ((616e12, 44.8e-3), (787e12, 39.6e-3))
)

# MFU that others published for dense models of 7 to 8 billion parameters. v6e:
# Llama 3.1 8B on 256 chips, in MaxText's "Optimized models tiering". The others
# were handed to us and not traced (that page has 65.4 % on v5p, for 70 billion
# parameters).
PUBLISHED_MFU = {
  "v6e": (0.45, 0.45),
  "v5e": (0.46, 0.46),
  "v5p": (0.65, 0.71),
  "h100": (0.39, 0.41),
}


def step_seconds(
  work: Work, train: TrainConfig, chip: Chip, num_chips: int, shares: Shares
) -> float:
  """Seconds of a step's computation and memory traffic at these shares.

  Args:
    work: of the step.
    train: of the run.
    chip: published rates.
    num_chips: how many share the work.
    shares: of the published rates.
  """
  total = 0.0
  for product, times, again, _ in work.passes:
    if product.part == "llm.head":
      share = shares.loss
    elif product.weights:
      share = shares.products
    else:
      share = shares.attention
    total += product.flops * (times + again) / share
  compute = train.global_batch_size * total / (chip.flops * num_chips)
  memory = work.hbm_bytes / (chip.bandwidth / chip.devices) / shares.memory
  return max(compute, memory)
