"""What a checkpoint holds, read for evaluation, prediction or a new run."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from argenseg_jax import config_parsing, sharding
from argenseg_jax.checkpoint import layout
from argenseg_jax.checkpoint.layout import CheckpointError, step_directory
from argenseg_jax.config import ConfigError, MeshConfig, ModelConfig
from argenseg_jax.data import text
from argenseg_jax.models import int8
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.runtime.paths import Path, said

FORMAT = 1


# What a checkpoint holds, by the name in its meta data.
MODELS: dict[str, Callable[..., nnx.Module]] = {
  "vqvae": lambda config, **kwargs: VQVAE(config.vqvae, **kwargs),
  "mllm": ARGenSeg,
}


@dataclasses.dataclass(frozen=True)
class Description:
  """What a step says of itself.

  Attributes:
    task: what it holds, a key of `MODELS`.
    config: sizes of the whole model.
    meta: everything that it says.
    path: its directory.
  """

  task: str
  config: ModelConfig
  meta: dict[str, Any]
  path: Path

  @property
  def is_whole(self) -> bool:
    """Whether it holds a whole model, not an image tokenizer only."""
    return self.task != "vqvae"


@dataclasses.dataclass(frozen=True)
class Loaded(Description):
  """A model read for evaluation, prediction or as a starting point."""

  model: nnx.Module


def text_tokenizer(found: Description) -> text.TextTokenizer:
  """The text tokenizer of a whole model.

  Raises:
    CheckpointError: there is none beside the checkpoint.
    DataError: it is of another model.
  """
  path = layout.text_tokenizer_path(found.path)
  layout.require_unchanged(found.path, path.name)
  if not path.is_file():
    raise CheckpointError(
      f"checkpoint {found.path} has no text tokenizer; import it again with "
      f"--tokenizer FILE, or put the model's own at {path}."
    )
  tokenizer = text.TextTokenizer(
    path, first_code=found.config.token_ids.first_code
  )
  tokenizer.require(found.config.token_ids)
  return tokenizer


def describe(path: str | Path) -> Description:
  """Reads the meta data of a checkpoint; see `step_directory` for `path`.

  Raises:
    CheckpointError: no checkpoint there, or none of this format.
  """
  where = step_directory(path)
  meta = read_meta(where)
  try:
    config = config_parsing.from_mapping(ModelConfig, meta["model"])
    task = meta["task"]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _unreadable_meta(where, error) from error
  return Description(task, config, meta, where)


def read_meta(step: Path) -> dict[str, Any]:
  try:
    meta = json.loads((step / "meta" / "metadata").read_text())
    found = meta.get("format")
  except (OSError, ValueError, AttributeError, RecursionError) as error:
    raise _unreadable_meta(step, error) from error
  if found != FORMAT:
    raise CheckpointError(
      f"checkpoint {step} has format {found}, this version reads {FORMAT}."
    )
  return meta


def _unreadable_meta(step: Path, error: Exception) -> CheckpointError:
  return CheckpointError(
    f"checkpoint {step} has unreadable meta data ({error})."
  )


def load(
  path: str | Path,
  *,
  mesh: Mesh | None = None,
  dtype: DTypeLike = jnp.float32,
  weights: int8.Weights | None = None,
) -> Loaded:
  """Reads the model of a checkpoint, each variable onto its own shards.

  Variables keep the dtype that they were saved in.

  Args:
    path: see `step_directory`.
    mesh: all devices along `data` by default.
    dtype: compute dtype of the returned model.
    weights: eight bits for the decoder's weights, for inference only.

  Raises:
    CheckpointError: no checkpoint there, a leaf that does not fit, or no
      decoder for `weights`.
  """
  found = describe(path)
  if weights is not None and not found.is_whole:
    raise CheckpointError(
      f"checkpoint {found.path} holds an image tokenizer only; {weights} "
      "weights are for decoders."
    )
  mesh = mesh or sharding.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
  make = model_factory(found.task, found.config, dtype=dtype)
  graph, abstract = nnx.split(nnx.eval_shape(make))
  shardings = sharding.state_shardings(abstract, mesh)
  wanted = nnx.to_pure_dict(
    jax.tree.map(
      lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
      abstract,
      shardings,
    )
  )
  stored = stored_tree(found.path / "model")
  compare(wanted, stored, found.path)
  saved = _by_name(stored)
  wanted = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.update(dtype=saved[_name(path)].dtype), wanted
  )
  with ocp.StandardCheckpointer() as reader:
    values = reader.restore(found.path / "model", wanted)
  model: Any = nnx.merge(graph, with_values(abstract, values))
  if weights is not None:
    int8.quantize(model.llm, weights)
  return Loaded(found.task, found.config, found.meta, found.path, model)


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


def model_factory(
  task: str,
  config: ModelConfig,
  *,
  seed: int = 0,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike = jnp.float32,
):
  """A constructor without arguments of a model, `task` being its key in
  `MODELS`."""

  def make():
    return MODELS[task](
      config, rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=param_dtype
    )

  return make


def stored_tree(item: Path) -> Any:
  """Shapes and dtypes of an item on disk.

  Raises:
    CheckpointError: nothing there can be restored.
  """
  try:
    with ocp.StandardCheckpointer() as reader:
      return reader.metadata(item).item_metadata.tree
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise CheckpointError(
      f"checkpoint {item.parent} cannot be restored: files of its "
      f"{item.name!r} are missing or damaged ({said(error)})."
    ) from error


def structure_faults(step: Path) -> tuple[str, ...]:
  """Why a step cannot be restored, whatever its manifest says; empty if it can.

  Compares names and shapes with the model that its meta data describe, without
  reading arrays.
  """
  try:
    meta = read_meta(step)
    config = config_parsing.from_mapping(ModelConfig, meta["model"])
    abstract = nnx.eval_shape(model_factory(meta["task"], config))
    wanted = nnx.to_pure_dict(nnx.state(abstract))
    compare(wanted, stored_tree(step / "model"), step)
    if (step / "optimizer").exists():
      stored_tree(step / "optimizer")
  except (CheckpointError, ConfigError) as error:
    return (str(error),)
  except (KeyError, TypeError, ValueError) as error:
    return (str(_unreadable_meta(step, error)),)
  return ()


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
