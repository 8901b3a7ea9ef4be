"""Production shapes, for compile checks and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
  tokens: int
  width: int
  words: int


PRODUCTION = (
  Shape(8192, 4096, 96653),  # ARGenSeg-8B: InternLM2.5-7B.
  Shape(16384, 4096, 96653),
  Shape(16384, 896, 151674),  # InternVL2.5-1B: Qwen2-0.5B.
  Shape(8192, 2048, 151674),
  Shape(8192, 3584, 151674),
)
