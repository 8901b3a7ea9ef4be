"""Collectives of a compiled program, read from its HLO text."""

import math
import re
from collections import defaultdict
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(calls|to_apply|body|condition|true_computation|false_computation)="
  r"%?([\w.\-]+)"
)
_CALLED_LISTS = re.compile(
  r"(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'known_trip_count\D*?"?n"?\D*?(\d+)')
_IOTA = re.compile(
  r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_CHAIN = re.compile(r'frontend_attributes=\{[^}]*chain_id="(\d+)"')
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")


class Collective(NamedTuple):
  """One collective operation.

  Attributes:
    kind: one of `KINDS`.
    shapes: of the whole arrays that it makes, reduces or scatters; several
      where operations were combined.
    size: bytes of these arrays.
    group: ids of the devices of one group, positions in the mesh.
    runs: how often a step runs it.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  size: int
  group: tuple[int, ...]
  runs: int

  @property
  def sent(self) -> float:
    """Bytes that one device must send, and receive, in all runs."""
    share = (len(self.group) - 1) / max(len(self.group), 1)
    twice = 2 if self.kind == "all-reduce" else 1
    if self.kind == "collective-permute":
      share = 1
    return self.size * share * twice * self.runs


def collectives(text: str) -> list[Collective]:
  """All collectives of a program's `as_text()`, loops counted in `runs`.

  A TPU's reduce-scatter may be a fused all-reduce and slice; it is told by the
  name of the fused computation. What it runs beside other work stands in every
  fusion that it overlaps with, under one chain id: it is counted once.
  """
  bodies, entry = _computations(text)
  runs = _runs(bodies, entry)
  found = []
  chains = set()
  for name, lines in bodies.items():
    if not runs[name]:
      continue
    scatters = "reduce-scatter" in name
    for line in lines:
      match = _INSTRUCTION.match(line)
      if match is None:
        continue
      opcode = match[3].removesuffix("-start")
      if opcode not in KINDS:
        continue
      group = _group(line)
      if len(group) == 1:
        continue
      if chain := _CHAIN.search(line):
        if (opcode, chain[1]) in chains:
          continue
        chains.add((opcode, chain[1]))
      shapes = [_shape(*s) for s in _SHAPE.findall(match[2])]
      starts = match[3].endswith("-start")
      if starts and opcode in ("all-gather", "reduce-scatter"):
        shapes = shapes[len(shapes) // 2 :]  # Inputs, then outputs.
      elif starts and opcode == "collective-permute":
        shapes = shapes[:1]
      size = sum(s for _, s in shapes)
      whole = tuple(shape for shape, _ in shapes)
      if opcode == "reduce-scatter":
        size *= len(group)
        dimension = re.search(r"dimensions=\{(\d+)\}", line)
        axis = int(dimension[1]) if dimension else 0
        whole = tuple(_scaled(shape, axis, len(group)) for shape in whole)
      kind = "reduce-scatter" if scatters else opcode
      found.append(Collective(kind, whole, size, group, runs[name]))
  return found


def _scaled(shape: tuple[int, ...], axis: int, by: int) -> tuple[int, ...]:
  return tuple(s * (by if i == axis else 1) for i, s in enumerate(shape))


def reduced_whole(
  found: list[Collective],
  split: Collection[tuple[int, ...]],
  *,
  parts: int,
  smallest: int = 0,
) -> list[tuple[int, ...]]:
  """Gradients of split parameters that are all-reduced, not reduce-scattered.

  Args:
    found: of a program.
    split: sorted shapes of the parameters that fsdp splits.
    parts: into how many. A scatter along a dimension after the first gives
      each part a place in a new first dimension (`kernels.collectives`).
    smallest: elements below which a gradient does not count.
  """
  if parts == 1:
    return []

  def is_split(shape):
    forms = [shape]
    if len(shape) > 1 and shape[0] == parts:
      forms += [_scaled(shape[1:], i, parts) for i in range(len(shape) - 1)]
    return any(tuple(sorted(s for s in f if s > 1)) in split for f in forms)

  return [
    shape
    for collective in found
    if collective.kind == "all-reduce"
    for shape in collective.shapes
    if math.prod(shape) >= smallest and is_split(shape)
  ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  bodies, entry, current = {}, "", None
  for line in text.splitlines():
    stripped = line.strip()
    match = _COMPUTATION.match(stripped)
    if match and not line.startswith(" "):
      current = bodies.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif current is not None:
      current.append(stripped)
  return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
  """How often each computation runs."""
  calls = {}
  for name, lines in bodies.items():
    calls[name] = []
    for line in lines:
      trips = 1
      if " while(" in line:
        known = _TRIPS.search(line)
        trips = int(known[1]) if known else _trips_by_condition(line, bodies)
      for role, callee in _CALLED.findall(line):
        calls[name].append((callee, trips if role == "body" else 1))
      for group in _CALLED_LISTS.findall(line):
        calls[name] += [(c.strip(" %"), 1) for c in group.split(",")]
  totals: dict[str, int] = defaultdict(int)

  def visit(name, times):
    totals[name] += times
    for callee, trips in calls.get(name, ()):
      visit(callee, times * trips)

  visit(entry, 1)
  return totals


def _trips_by_condition(line: str, bodies) -> int:
  """Trips of a loop that counts from 0 to its condition's only constant."""
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  lines = bodies.get(condition[1], []) if condition else []
  limits = [int(n) for x in lines for n in re.findall(r" constant\((\d+)\)", x)]
  return limits[0] if len(limits) == 1 else 1


def _shape(dtype: str, dims: str) -> tuple[tuple[int, ...], int]:
  shape = tuple(int(d) for d in dims.split(",") if d)
  digits = re.search(r"\d+", dtype)
  size = _BYTES.get(dtype) or max(int(digits[0]) // 8 if digits else 1, 1)
  return shape, size * math.prod(shape)


def _group(line: str) -> tuple[int, ...]:
  """Ids of the first replica group; of the first pair of a permutation."""
  iota = _IOTA.search(line)
  if iota:
    sizes, source, order = (
      tuple(map(int, g.split(","))) if g else () for g in iota.groups()
    )
    ids = np.arange(math.prod(source)).reshape(source)
    if order:
      ids = ids.transpose(order)
    return tuple(int(i) for i in ids.reshape(sizes)[0])
  named = _NAMED.search(line)
  if named:
    sizes = dict(pair.split("=") for pair in named[1].split(","))
    ids = np.arange(math.prod(map(int, sizes.values())))
    ids = ids.reshape([int(size) for size in sizes.values()])
    along = [slice(None) if n in named[2].split(",") else 0 for n in sizes]
    return tuple(int(i) for i in ids[tuple(along)].ravel())
  listed = _LISTED.search(line)
  if listed and listed[1]:
    return tuple(map(int, listed[1].split(",")))
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
  return (int(pairs[1]), int(pairs[2])) if pairs else (0, 0)
