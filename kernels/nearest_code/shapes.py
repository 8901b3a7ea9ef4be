"""Production shapes, for compile checks and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
  latents: int
  channels: int = 32
  codes: int = 4096


PRODUCTION = (
  Shape(1),
  Shape(169 * 8),
  Shape(256 * 64),
  Shape(1024 * 64),
)
