"""Device mesh, the one table from logical axes to mesh axes, shards of arrays.

Mesh axes: `slice` counts the parts of a pod that are joined by the data-center
network; `data` copies the parameters, `fsdp` splits them, and both split the
batch; `tensor` splits heads and MLPs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)
from jaxtyping import Array

from argenseg_jax import construct
from argenseg_jax.config import ConfigError, MeshConfig
from argenseg_jax.kernels import collectives

AnyMesh = Mesh | AbstractMesh
MESH_AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")

# Logical axis of a parameter or activation -> mesh axes it is split over.
# Words stay whole: no released vocabulary divides by two, and `embed` splits
# the tables well enough.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
  "batch": BATCH_AXES,
  "embed": "fsdp",
  "vocab": None,
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
  config: MeshConfig,
  devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
  *,
  slices: int | None = None,
) -> Mesh:
  """A mesh with axes slice, data, fsdp, tensor over all devices.

  Args:
    config: sizes within a slice; one may be -1 for what the others leave.
    devices: all of them by default.
    slices: as many as the devices say by default.

  Raises:
    config.ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = list(devices or jax.devices())
  if slices is None:
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
  sizes = _sizes(config, len(devices), slices)
  return Mesh(
    _arrange(devices, sizes, slices),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def abstract_mesh(
  config: MeshConfig, num_devices: int, slices: int
) -> AbstractMesh:
  """The same mesh without devices: for shapes of shards.

  Raises:
    config.ConfigError: as `make_mesh`.
  """
  return AbstractMesh(
    (slices, *_sizes(config, num_devices, slices)),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def _sizes(config: MeshConfig, num_devices: int, slices: int) -> list[int]:
  """Devices along data, fsdp and tensor within a slice."""
  count, rest = divmod(num_devices, slices)
  sizes = [getattr(config, axis) for axis in MESH_AXES[1:]]
  text = ", ".join(
    f"{a}={s}" for a, s in zip(MESH_AXES[1:], sizes, strict=True)
  )
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise ConfigError(f"mesh ({text}) needs positive sizes and at most one -1.")
  if -1 in sizes:
    known = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count or rest:
    found = f"{num_devices} devices"
    if slices > 1:
      found += f" in {slices} slices"
    raise ConfigError(
      f"mesh ({text}) does not fit {found}; the product of its sizes must be "
      "the number of devices of a slice."
    )
  return sizes


def _arrange(devices, sizes: list[int], slices: int) -> np.ndarray:
  """Devices in mesh order; neighbors on a TPU's network stay neighbors."""
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(slices, *sizes)
  # Only multi-slice devices know which slice they are in.
  if slices == 1:
    return mesh_utils.create_device_mesh(
      (1, *sizes), devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_hybrid_device_mesh(
    (1, *sizes),
    (slices, 1, 1, 1),
    devices,
    allow_split_physical_axes=True,
  )


def num_shards(mesh: AnyMesh) -> int:
  """Into how many parts a batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
  """XLA's options for a program that gathers and scatters over a mesh."""
  return collectives.compiler_options(mesh.devices.flat[0].device_kind)


def spec(axes: Sequence[str | None]) -> PartitionSpec:
  """Partition of an array whose dimensions carry these logical names."""
  return PartitionSpec(*(RULES[axis] for axis in axes))


def state_shardings(state: Any, mesh: AnyMesh) -> Any:
  """The sharding of every variable of `state`, from its `axes` metadata.

  Args:
    state: concrete or abstract (`jax.eval_shape`) variables, in any tree;
      leaves that are no variables (counters) are replicated.
    mesh: from `make_mesh`.

  Returns:
    A pytree like `state` with `NamedSharding` leaves.

  Raises:
    config.ConfigError: a dimension does not divide by its mesh axes.
  """

  def one(path, variable):
    if not isinstance(variable, nnx.Variable):
      return replicated(mesh)
    if not jax.tree.leaves(variable):  # Masked out of an optimizer.
      return variable
    axes = _axes(variable)
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

  return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_variable)


def _is_variable(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
  rank = len(variable.shape)
  axes = variable.get_metadata().get("axes", (None,) * rank)
  return tuple(axes[len(axes) - rank :])  # A scan takes "layers" away.


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over slices, data and fsdp, everything else whole."""
  return NamedSharding(mesh, spec(("batch",)))


def replicated(mesh: AnyMesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def placed(tree: Any, shardings: Any) -> Any:
  """Abstract arrays of `tree`'s shapes and dtypes with shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def jit(function: Callable, **options: Any) -> Any:
  """`jax.jit`, for a program that runs on the devices of its arguments.

  XLA splits such a program, but no kernel in it. So the arguments' mesh is in
  use while the program is traced, by which `kernels.dispatch` knows that it
  will be split, and over which devices.
  """

  @functools.wraps(function)
  def traced(*args, **kwargs):
    arrays = filter(_is_array, jax.tree.leaves((args, kwargs)))
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    mesh = next((m for m in meshes if not m.empty), None)
    if mesh is None:
      return function(*args, **kwargs)
    with jax.sharding.use_abstract_mesh(mesh):
      return function(*args, **kwargs)

  return jax.jit(traced, **options)


def _is_array(x: Any) -> bool:
  return isinstance(x, jax.Array)


def create_sharded(
  make: Callable[[], nnx.Module], mesh: Mesh
) -> tuple[nnx.GraphDef, nnx.State]:
  """Runs a module's constructor under jit, so that every parameter is born
  sharded and no device ever holds the whole model."""
  graph, abstract = nnx.split(construct.abstract(make))
  shardings = state_shardings(abstract, mesh)
  # Runs once: on a CPU, optimizing it would take ten times as long.
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


def mesh_of(state) -> Mesh | None:
  """The mesh that `state` lives on; None for a single device without one."""
  return getattr(jax.tree.leaves(state)[0].sharding, "mesh", None)


def put_rows(batch, state):
  """This host's rows of a global batch, onto the mesh of `state`; left as they
  are where there is none."""
  mesh = mesh_of(state)
  return batch if mesh is None else put_batch(batch, mesh)


def put_like(batch, state):
  """A batch onto the mesh that `state` lives on, rows split where they divide.

  Left as it is where `state` lives on no mesh.
  """
  mesh = mesh_of(state)
  if mesh is None:
    return batch
  parts = num_shards(mesh)

  def put(x):
    divides = len(x) % parts == 0
    return jax.device_put(
      x, batch_sharding(mesh) if divides else replicated(mesh)
    )

  return jax.tree.map(put, batch)


def check_hosts(mesh: Mesh, global_batch_size: int) -> None:
  """Refuses meshes and batches that hosts cannot feed row by row.

  Raises:
    config.ConfigError: a batch that does not divide, or one row that several
      hosts would have to feed.
  """
  shards = num_shards(mesh)
  if global_batch_size % shards:
    raise ConfigError(
      f"global_batch_size {global_batch_size} does not divide over the "
      f"{shards} parts of mesh axes slice, data and fsdp."
    )
  for row in mesh.devices.reshape(shards, -1):
    if len({device.process_index for device in row}) > 1:
      raise ConfigError(
        f"mesh axis 'tensor' of {mesh.shape['tensor']} spans several hosts; "
        "it must divide the devices of one host."
      )


# Inside `jax.shard_map`, where code sees its own shards only.


def local_spec(variable: nnx.Variable) -> PartitionSpec:
  """How a variable enters `shard_map` over the batch axes."""
  names = (RULES[axis] for axis in _axes(variable))
  return PartitionSpec(*(n if n in BATCH_AXES else None for n in names))


def local_specs(state: Any) -> Any:
  """`local_spec` of every variable of a tree."""
  return jax.tree.map(
    lambda v: v.replace(local_spec(v)), state, is_leaf=_is_variable
  )


def is_split(variable: nnx.Variable) -> bool:
  """Whether fsdp splits this variable."""
  return "fsdp" in local_spec(variable)


def gathers() -> bool:
  """Whether this code sees shards of parameters, which it must gather."""
  mesh = jax.sharding.get_abstract_mesh()
  return "fsdp" in mesh.manual_axes and mesh.shape["fsdp"] > 1


def gathered(state: Any) -> Any:
  """Whole parameters from the shards that this code sees.

  The gradient of a gathered parameter is reduce-scattered: each device ends
  with the sum of its own shard and the whole gradient is never kept.
  """
  if not gathers():
    return state

  def one(variable):
    if not is_split(variable):
      return variable
    dimension = tuple(local_spec(variable)).index("fsdp")
    return variable.replace(_whole(variable[...], dimension))

  return jax.tree.map(one, state, is_leaf=_is_variable)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(shard: Array, dimension: int) -> Array:
  return lax.all_gather(shard, "fsdp", axis=dimension, tiled=True)


def _whole_forward(shard, dimension):
  return _whole(shard, dimension), None


def _whole_backward(dimension, _, gradient):
  return (collectives.scatter_sum(gradient, "fsdp", dimension),)


_whole.defvjp(_whole_forward, _whole_backward)


def sum_gradients(gradients: Any) -> Any:
  """Sums over the batch axes what `gathered` has not summed already."""

  def one(variable):
    axes = BATCH_AXES[:-1] if is_split(variable) else BATCH_AXES
    return variable.replace(collectives.sum_over(variable[...], axes))

  return jax.tree.map(one, gradients, is_leaf=_is_variable)
