"""What a table of weights is made of: PyTorch name <-> path of our variable.

PyTorch keeps linear kernels as [out in] and convolutions as [out in h w], ours
are [in out] and [h w in out]; layers that we stack carry a leading axis.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one PyTorch tensor becomes one or more of our arrays, and back."""

  to_ours: Callable[[np.ndarray], Arrays]
  to_torch: Callable[[Arrays], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a table.

  Attributes:
    torch: PyTorch name; "{}" stands for the index within `stack`.
    ours: paths of our variables.
    transform: for one tensor.
    stack: 0, or how many tensors form the leading axis of `ours`.
  """

  torch: str
  ours: tuple[str, ...]
  transform: Transform
  stack: int = 0

  def names(self) -> list[str]:
    """PyTorch names of the rule, in the order of the stack."""
    if not self.stack:
      return [self.torch]
    return [self.torch.format(i) for i in range(self.stack)]


@dataclasses.dataclass(frozen=True)
class Carried:
  """A tensor of the authors' modules that computes nothing.

  Import keeps it beside the checkpoint; export writes it back, or zeros of
  `shape` where none was kept.
  """

  torch: str
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Table:
  rules: tuple[Rule, ...]
  carried: tuple[Carried, ...] = ()

  def prefixed(self, torch: str, ours: str = "") -> "Table":
    """The same table for a module inside another."""
    rules = (
      dataclasses.replace(
        rule, torch=torch + rule.torch, ours=tuple(ours + p for p in rule.ours)
      )
      for rule in self.rules
    )
    carried = (
      dataclasses.replace(c, torch=torch + c.torch) for c in self.carried
    )
    return Table(tuple(rules), tuple(carried))

  def __add__(self, other: "Table") -> "Table":
    return Table(self.rules + other.rules, self.carried + other.carried)


def one(to_ours, to_torch=None) -> Transform:
  """A transform of one array; its own inverse by default."""
  back = to_torch or to_ours
  return Transform(lambda x: (to_ours(x),), lambda xs: back(xs[0]))


SAME = one(lambda x: x)
LINEAR = one(lambda x: x.T)
CONV = one(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# [1 n d] and [1 1 d] to [n d] and [d].
BATCHED = one(lambda x: x[0], lambda x: x[None])
TWICE_BATCHED = one(lambda x: x[0, 0], lambda x: x[None, None])


def linear(torch: str, ours: str, bias: bool, stack: int = 0) -> Iterator[Rule]:
  yield Rule(f"{torch}.weight", (f"{ours}.kernel",), LINEAR, stack)
  if bias:
    yield Rule(f"{torch}.bias", (f"{ours}.bias",), SAME, stack)


def conv(torch: str, ours: str) -> Iterator[Rule]:
  yield Rule(f"{torch}.weight", (f"{ours}.kernel",), CONV)
  yield Rule(f"{torch}.bias", (f"{ours}.bias",), SAME)


def norm(torch: str, ours: str, bias: bool, stack: int = 0) -> Iterator[Rule]:
  yield Rule(f"{torch}.weight", (f"{ours}.scale",), SAME, stack)
  if bias:
    yield Rule(f"{torch}.bias", (f"{ours}.bias",), SAME, stack)
