"""Device mesh and the one table from logical axes to mesh axes."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from argenseg_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter or activation -> mesh axes it is split over.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "embed": "fsdp",
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "layers": None,
  "norm": None,
  "latent": None,
  "codes": None,
  "conv": None,
  None: None,
}


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh with axes data, fsdp, tensor over all devices.

  Args:
    config: sizes; one of them may be -1 for what the others leave.
    devices: all of them by default.

  Raises:
    config.ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = list(devices or jax.devices())
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  text = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise ConfigError(f"mesh ({text}) needs positive sizes and at most one -1.")
  if -1 in sizes:
    known = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise ConfigError(
      f"mesh ({text}) does not fit {len(devices)} devices; the product of its "
      "sizes must be the number of devices."
    )
  return Mesh(
    np.asarray(devices).reshape(sizes),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def spec(axes: Sequence[str | None]) -> PartitionSpec:
  """Partition of an array whose dimensions carry these logical names."""
  return PartitionSpec(*(RULES[axis] for axis in axes))


def state_shardings(state: nnx.State, mesh: Mesh):
  """The sharding of every variable of `state`, from its `axes` metadata.

  Args:
    state: concrete or abstract (`jax.eval_shape`) variables.
    mesh: from `make_mesh`.

  Returns:
    A pytree like `state` with `NamedSharding` leaves.

  Raises:
    config.ConfigError: a dimension does not divide by its mesh axes.
  """

  def one(path, variable):
    axes = variable.get_metadata().get("axes", (None,) * len(variable.shape))
    for size, axis in zip(variable.shape, axes, strict=True):
      mesh_axes = RULES[axis] or ()
      names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
      parts = math.prod(mesh.shape[name] for name in names)
      if size % parts:
        name = ".".join(str(getattr(p, "key", p)) for p in path)
        raise ConfigError(
          f"parameter {name} {tuple(variable.shape)} cannot be split: its axis "
          f"{axis!r} of {size} does not divide by mesh axis {names} of {parts}."
        )
    return variable.replace(NamedSharding(mesh, spec(axes)))

  return jax.tree_util.tree_map_with_path(
    one, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data and fsdp, everything else whole."""
  return NamedSharding(mesh, spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def create_sharded(
  make: Callable[[], nnx.Module], mesh: Mesh
) -> tuple[nnx.GraphDef, nnx.State]:
  """Runs a module's constructor under jit, so that every parameter is born
  sharded and no device ever holds the whole model."""
  abstract = nnx.eval_shape(make)
  graph, abstract_state = nnx.split(abstract)
  shardings = state_shardings(abstract_state, mesh)
  # Runs once: on a CPU, optimising it would take ten times as long.
  options = {}
  if mesh.devices.flat[0].platform == "cpu":
    options = {"xla_backend_optimization_level": 0}
  state = jax.jit(
    lambda: nnx.state(make()),
    out_shardings=shardings,
    compiler_options=options,
  )()
  return graph, state


def put_batch(batch, mesh: Mesh):
  """This host's rows of a global batch, onto its devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def put_like(batch, state):
  """A batch onto the mesh that `state` lives on, rows split where they divide.

  Left as it is where `state` lives on no mesh.
  """
  mesh = getattr(jax.tree.leaves(state)[0].sharding, "mesh", None)
  if mesh is None:
    return batch
  parts = math.prod(mesh.shape[axis] for axis in RULES["batch"])

  def put(x):
    whole = len(x) % parts
    return jax.device_put(
      x, replicated(mesh) if whole else batch_sharding(mesh)
    )

  return jax.tree.map(put, batch)
