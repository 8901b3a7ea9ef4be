"""Variables of a step on disk: their names and shapes, and reading them."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import sharding
from argenseg_jax.checkpoint.layout import CheckpointError, step_directory
from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path, said


def read_onto(step: Path, wanted: nnx.State, mesh: Mesh) -> nnx.State:
  """A step's variables on their shards, in the dtypes that they were saved in.

  Raises:
    CheckpointError: they are not those of `wanted`, or of other shapes.
  """
  shardings = sharding.state_shardings(wanted, mesh)
  abstract = nnx.to_pure_dict(sharding.placed(wanted, shardings))
  stored = stored_tree(step / "model")
  compare(abstract, stored, step)
  saved = _by_name(stored)
  abstract = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.update(dtype=saved[_name(path)].dtype), abstract
  )
  with ocp.StandardCheckpointer() as reader:
    values = reader.restore(step / "model", abstract)
  return with_values(wanted, values)


def stored_variables(step: Path) -> dict[str, Any]:
  """Shape, dtype and sharding of a step's variables, by dotted name; without
  reading them."""
  return _by_name(stored_tree(step / "model"))


def read_variables(path: str | Path) -> dict[str, np.ndarray]:
  """The variables of a checkpoint by dotted name, all in host memory.

  Raises:
    CheckpointError: see `step_directory`.
  """
  item = step_directory(path) / "model"
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    stored_tree(item),
    is_leaf=lambda x: hasattr(x, "shape"),
  )
  with ocp.StandardCheckpointer() as reader:
    values = _by_name(reader.restore(item, wanted))
  return {name: np.asarray(value) for name, value in values.items()}


def stored_tree(item: Path) -> Any:
  """Shapes and dtypes of an item on disk.

  Raises:
    CheckpointError: nothing there can be restored.
  """
  try:
    with ocp.StandardCheckpointer() as reader:
      # Orbax finds nothing by a relative path, and says nothing.
      return reader.metadata(paths.absolute(item)).item_metadata.tree
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise CheckpointError(
      f"checkpoint {item.parent} cannot be restored: files of its "
      f"{item.name!r} are missing or damaged ({said(error)})."
    ) from error


def with_values(state: nnx.State, values: dict[str, Any]) -> nnx.State:
  state = jax.tree.map(lambda x: x, state)
  nnx.replace_by_pure_dict(state, values)
  return state


def compare(
  wanted: Any, found: Any, where: Path, *, dtypes: bool = False
) -> None:
  """Raises `CheckpointError` naming the first leaf that does not fit, in shape
  and, if asked, in dtype."""
  wanted, found = _by_name(wanted), _by_name(found)
  for name in sorted(wanted.keys() | found.keys()):
    if name not in found:
      raise CheckpointError(
        f"checkpoint {where} lacks {name}; it is of another model variant."
      )
    if name not in wanted:
      raise CheckpointError(
        f"checkpoint {where} holds {name}, which this model has not; it is of "
        "another model variant."
      )
    if tuple(wanted[name].shape) != tuple(found[name].shape):
      raise CheckpointError(
        f"checkpoint {where} holds {name} of shape {tuple(found[name].shape)}, "
        f"this model needs {tuple(wanted[name].shape)}."
      )
    if dtypes and wanted[name].dtype != found[name].dtype:
      raise CheckpointError(
        f"checkpoint {where} holds {name} as {found[name].dtype}, this run "
        f"keeps it as {wanted[name].dtype}; set train.param_dtype to match."
      )


def _by_name(tree: Any) -> dict[str, Any]:
  """Leaves by dotted path; Orbax turns numbers in paths into text."""
  flat, _ = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: hasattr(x, "shape")
  )
  return {_name(path): leaf for path, leaf in flat}


def _name(path) -> str:
  return ".".join(str(getattr(k, "key", k)) for k in path)
