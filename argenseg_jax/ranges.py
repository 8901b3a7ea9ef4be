"""Numbers that a setting may take, said beside its type.

`Annotated[int, Range(1)]` is an int of 1 or more; `config_parsing` checks it
when a config is read, once for every run, and nowhere else.
"""

import dataclasses
import math
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval of finite numbers.

  Attributes:
    low: the lowest.
    high: the highest.
    above: `low` itself is outside.
    below: `high` itself is outside.
    also: a number that is allowed besides.
  """

  low: float
  high: float = math.inf
  above: bool = False
  below: bool = False
  also: int | None = None

  def __contains__(self, value: float) -> bool:
    if value == self.also:
      return True
    low = self.low < value if self.above else self.low <= value
    high = value < self.high if self.below else value <= self.high
    return low and high and math.isfinite(value)

  def __str__(self) -> str:
    """As in "use 1 or more"."""
    if self.high == math.inf:
      text = f"more than {self.low}" if self.above else f"{self.low} or more"
    elif self.above or self.below:
      low = f"more than {self.low}" if self.above else f"{self.low} or more"
      high = f"less than {self.high}" if self.below else f"at most {self.high}"
      text = f"{low} and {high}"
    else:
      text = f"{self.low} to {self.high}"
    return text if self.also is None else f"{self.also}, or {text}"


MOST = 2**31 - 1  # Steps, rows, ... are counted in 32 bits on devices.
Count = Annotated[int, Range(0, MOST)]
PositiveInt = Annotated[int, Range(1, MOST)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]  # Of a moving average.
# Of random numbers: what `jax.random.key` and NumPy take alike.
Seed = Annotated[int, Range(0, MOST)]
AxisSize = Annotated[
  int, Range(1, MOST, also=-1)
]  # -1: the devices that are left.
