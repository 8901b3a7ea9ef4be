"""Applies a table: PyTorch tensors to our variables and back, shape by shape.

Nothing here knows a model; everything follows from a `tables.Table` and the
(abstract) variables of a module.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import sharding
from argenseg_jax.torch_weights import tensors
from argenseg_jax.torch_weights.tables import Rule, Table
from argenseg_jax.torch_weights.tensors import (
  Source,
  TensorInfo,
  WeightsError,
)

# Buffers that some versions of PyTorch's modules save: they follow from the
# config, so that nothing is lost without them.
_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
# Non-trainable variables of ours that PyTorch checkpoints do not hold.
OURS_ONLY = ("quantizer.assignment_cost",)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one PyTorch tensor lives among our variables."""

  rule: Rule
  index: int | None  # Within a stack.


def variables(state: nnx.State) -> dict[str, Any]:
  """Leaves of a state by dotted path."""
  return {
    ".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)
  }


def places(table: Table) -> dict[str, Place]:
  """Every PyTorch name of a table, in the table's order."""
  found: dict[str, Place] = {}
  for rule in table.rules:
    for i, name in enumerate(rule.names()):
      found[name] = Place(rule, i if rule.stack else None)
  return found


def torch_shapes(table: Table, leaves: Mapping[str, Any]) -> dict[str, tuple]:
  """The shape of every PyTorch tensor that variables of these shapes fill.

  Args:
    table: its rules must cover `leaves` exactly.
    leaves: path -> anything with a `shape`.

  Raises:
    ValueError: a rule names no variable, or a variable has no rule.
  """
  paths = [path for rule in table.rules for path in rule.ours]
  wanted = {p for p in leaves if not p.endswith(OURS_ONLY)}
  if sorted(paths) != sorted(wanted):
    odd = sorted(set(paths) ^ wanted)
    raise ValueError(f"table and model disagree about {odd[:3]}")
  shapes = {}
  for rule in table.rules:
    # Views of nothing: only the wqkv transform allocates, one layer of bytes.
    dummies = tuple(
      np.broadcast_to(np.zeros((), np.int8), _layer_shape(rule, leaves[p]))
      for p in rule.ours
    )
    shape = rule.transform.to_torch(dummies).shape
    shapes |= dict.fromkeys(rule.names(), shape)
  return shapes


def check(
  table: Table, leaves: Mapping[str, Any], source: Source, where: str
) -> list[str]:
  """Compares names and shapes of `source` with what `table` needs.

  Returns:
    Names of the carried tensors that `source` holds.

  Raises:
    WeightsError: the first tensor that is missing, unexpected or mis-shaped.
  """
  expected = torch_shapes(table, leaves)
  carried = {c.torch: c.shape for c in table.carried}
  found = source.tensors
  for name, shape in expected.items():
    if name not in found:
      close = difflib.get_close_matches(name, set(found) - set(expected), 1)
      hint = f"; there is an unexpected {close[0]!r}" if close else ""
      raise WeightsError(f"{where} lacks tensor {name!r}{hint}.")
    if tuple(found[name].shape) != tuple(shape):
      raise WeightsError(
        f"{where} contains {name!r} of shape {tuple(found[name].shape)}; its "
        f"config asks for {tuple(shape)}."
      )
    if not tensors.is_floating(found[name].dtype):
      raise WeightsError(
        f"{where} contains {name!r} as {found[name].dtype}; quantized weights "
        "are not supported."
      )
  for name in found:
    if name.endswith(_DERIVED):
      continue
    if name not in expected and name not in carried:
      raise WeightsError(
        f"{where} contains an unexpected tensor {name!r}; it is of another "
        "model, or its config.json is not its own."
      )
  return [name for name in carried if name in found]


def load(
  table: Table, state: nnx.State, source: Source, mesh: Mesh
) -> tuple[nnx.State, dict[str, str]]:
  """Fills `state` from `source`, one PyTorch tensor in memory at a time.

  Every variable is born sharded over `mesh` and keeps the dtype that its
  tensors have on disk.

  Args:
    table: see `check`, which must have passed.
    state: abstract variables, with `axes` metadata.
    source: the tensors.
    mesh: from `sharding.make_mesh`.

  Returns:
    The filled state, and the dtypes of tensors whose variable had to take a
    wider one (a stack of layers that differ).
  """
  shardings = variables(sharding.state_shardings(state, mesh))
  leaves = variables(state)
  filled = {
    path: leaf.replace(jax.device_put(np.zeros(leaf.shape, leaf.dtype)))
    for path, leaf in leaves.items()
    if path.endswith(OURS_ONLY)
  }
  odd: dict[str, str] = {}
  for rule in table.rules:
    names = rule.names()
    dtypes = {name: np.dtype(source.tensors[name].dtype) for name in names}
    dtype = _widest(dtypes.values())
    odd |= {n: str(d) for n, d in dtypes.items() if d != dtype}
    for i, path in enumerate(rule.ours):
      leaf = leaves[path]
      filled[path] = leaf.replace(
        _fill(rule, i, leaf.shape, dtype, source, shardings[path].get_value())
      )
  flat = [
    (path, filled[".".join(map(str, path))])
    for path, _ in nnx.to_flat_state(state)
  ]
  return nnx.from_flat_state(flat), odd


def _fill(rule: Rule, part: int, shape, dtype, source, leaf_sharding):
  """One variable, from buffers of the shards that this host holds."""
  indices = leaf_sharding.addressable_devices_indices_map(shape).values()
  buffers = {
    spans: np.empty([stop - start for start, stop in spans], dtype)
    for spans in {_spans(index, shape) for index in indices}
  }
  for layer, name in enumerate(rule.names()):
    value = rule.transform.to_ours(source.read(name))[part]
    for spans, buffer in buffers.items():
      slices = tuple(slice(*span) for span in spans)
      if not rule.stack:
        buffer[...] = value[slices]
      elif spans[0][0] <= layer < spans[0][1]:
        buffer[layer - spans[0][0]] = value[slices[1:]]
  return jax.make_array_from_callback(
    shape, leaf_sharding, lambda index: buffers[_spans(index, shape)]
  )


class Exported:
  """Our variables as a source of PyTorch tensors.

  Args:
    table: names and transforms.
    leaves: path -> array.
    dtypes: PyTorch name -> dtype, where it is not its variable's.
    carried: kept tensors that compute nothing.
  """

  def __init__(
    self,
    table: Table,
    leaves: Mapping[str, Any],
    *,
    dtypes: Mapping[str, Any] | None = None,
    carried: Source | None = None,
  ):
    dtypes = dtypes or {}
    self._leaves, self._places = leaves, places(table)
    self._carried, self.tensors = carried, {}
    for name, shape in torch_shapes(table, leaves).items():
      leaf = leaves[self._places[name].rule.ours[0]]
      dtype = np.dtype(dtypes.get(name, leaf.dtype))
      self.tensors[name] = TensorInfo(tuple(shape), dtype)
    for kept in table.carried:
      info = TensorInfo(kept.shape, np.dtype(np.float32))
      if carried is not None and kept.torch in carried.tensors:
        info = carried.tensors[kept.torch]
      self.tensors[kept.torch] = info

  def read(self, name: str) -> np.ndarray:
    info = self.tensors[name]
    if name not in self._places:
      if self._carried is not None and name in self._carried.tensors:
        return self._carried.read(name)
      return np.zeros(info.shape, info.dtype)
    place = self._places[name]
    rule, index = place.rule, place.index
    parts = (self._leaves[path] for path in rule.ours)
    parts = tuple(
      np.asarray(part if index is None else _layer(part, index))
      for part in parts
    )
    return rule.transform.to_torch(parts).astype(info.dtype, copy=False)


@jax.jit
def _layer(stack, index):
  """One program for all layers of a shape."""
  return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def _layer_shape(rule: Rule, leaf: Any) -> tuple[int, ...]:
  shape = tuple(leaf.shape)
  if not rule.stack:
    return shape
  if not shape or shape[0] != rule.stack:
    raise ValueError(f"{rule.ours} of {shape} is no stack of {rule.stack}")
  return shape[1:]


def _widest(dtypes) -> np.dtype:
  kinds = sorted(set(dtypes), key=lambda d: (d.itemsize, str(d)))
  if len(kinds) > 1 and kinds[-1].itemsize == kinds[0].itemsize:
    return np.dtype(np.float32)  # bfloat16 and float16 side by side.
  return kinds[-1]


def _spans(index, shape) -> tuple[tuple[int, int], ...]:
  """Start and stop of a shard along each axis."""
  return tuple(
    part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
  )
