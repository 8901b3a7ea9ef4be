"""Production shapes, for compile checks and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
  batch: int
  positions: int  # Of one scale.
  width: int
  codes: int = 4096
  channels: int = 32


PRODUCTION = (
  Shape(1, 1, 4096),  # ARGenSeg-8B: first, middle and last scale.
  Shape(1, 36, 4096),
  Shape(1, 256, 4096),
  Shape(64, 1, 4096),
  Shape(64, 256, 4096),
  Shape(8, 169, 896),
  Shape(64, 256, 896),
  Shape(16, 100, 2048),
  Shape(16, 256, 3584),
)
TOP_K = 900  # VAR's choice for images.
