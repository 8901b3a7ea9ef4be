"""The pyramid of token maps: side lengths, counts, offsets, phi index.

The only module that knows how scales are laid out in a sequence of codes.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Scales:
  """A coarse-to-fine list of square token maps.

  Codes of all scales stand one after another, each map in raster order.

  Attributes:
    sides: side length of each token map, coarse to fine; the last is the side
      of the latent.
    num_phis: how many phi convolutions the scales share.
  """

  sides: tuple[int, ...]
  num_phis: int = 4

  def __post_init__(self):
    object.__setattr__(self, "sides", tuple(int(s) for s in self.sides))
    if not self.sides or min(self.sides) < 1:
      raise ValueError(f"scales need positive side lengths, got {self.sides}")
    if list(self.sides) != sorted(set(self.sides)):
      raise ValueError(f"scales must grow from coarse to fine: {self.sides}")

  def __len__(self) -> int:
    return len(self.sides)

  @property
  def latent_side(self) -> int:
    return self.sides[-1]

  @functools.cached_property
  def counts(self) -> tuple[int, ...]:
    """Codes of each scale."""
    return tuple(s * s for s in self.sides)

  @property
  def num_codes(self) -> int:
    """Codes of one mask: 680 at 256 px, 2,240 at 512 px."""
    return sum(self.counts)

  @functools.cached_property
  def offsets(self) -> tuple[int, ...]:
    """Index of the first code of each scale."""
    return tuple(int(o) for o in np.cumsum((0, *self.counts[:-1])))

  @functools.cached_property
  def scale_of_code(self) -> np.ndarray:
    """int32 [num_codes]: which scale each code belongs to."""
    return np.repeat(np.arange(len(self), dtype=np.int32), self.counts)

  @functools.cached_property
  def phi_index(self) -> tuple[int, ...]:
    """Which phi each scale takes: the one whose tick lies nearest.

    Two of the released ten scales lie half-way between ticks, and the rounding
    of this float64 expression decides them (tests hold the resulting table).
    """
    n = self.num_phis
    margin = 1 / 3 / n if n == 4 else 1 / 2 / n
    ticks = np.linspace(margin, 1 - margin, n)
    last = max(len(self) - 1, 1)
    return tuple(
      int(np.argmin(np.abs(ticks - k / last))) for k in range(len(self))
    )

  def split(self, codes):
    """Cuts [..., num_codes] (or any array whose last axis runs over the codes)
    into one array per scale."""
    return [
      codes[..., o : o + n]
      for o, n in zip(self.offsets, self.counts, strict=True)
    ]


SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
