"""What a checkpoint holds, read for evaluation, prediction or a new run."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from argenseg_jax import config_parsing, construct, sharding
from argenseg_jax.checkpoint import layout
from argenseg_jax.checkpoint.layout import CheckpointError, step_directory
from argenseg_jax.checkpoint.variables import compare, read_onto, stored_tree
from argenseg_jax.config import ConfigError, LoRAConfig, MeshConfig
from argenseg_jax.data import text
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import int8, lora
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.runtime.paths import Path

FORMAT = 1


# What a checkpoint holds, by the name in its meta data.
MODELS: dict[str, Callable[..., nnx.Module]] = {
  "vqvae": lambda config, **kwargs: VQVAE(config.vqvae, **kwargs),
  "mllm": ARGenSeg,
}


@dataclasses.dataclass(frozen=True)
class Adapters:
  """What a checkpoint of adapters says of them.

  Attributes:
    base: `lora.fingerprint` of the model that they were trained on.
    base_path: where it was.
    lora: their settings.
  """

  base: str
  base_path: str
  lora: LoRAConfig


@dataclasses.dataclass(frozen=True)
class Description:
  """What a step says of itself.

  Attributes:
    task: what it holds, a key of `MODELS`.
    config: sizes of the whole model.
    meta: everything that it says.
    path: its directory.
    adapters: what it says of its adapters, if it holds nothing else.
  """

  task: str
  config: ModelConfig
  meta: dict[str, Any]
  path: Path
  adapters: Adapters | None = dataclasses.field(default=None, kw_only=True)

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
    task, config, adapters = _described(meta)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _unreadable_meta(where, error) from error
  return Description(task, config, meta, where, adapters=adapters)


def _described(
  meta: dict[str, Any],
) -> tuple[str, ModelConfig, Adapters | None]:
  config = config_parsing.from_mapping(ModelConfig, meta["model"])
  adapters = None
  if meta.get("adapters") is not None:
    adapters = config_parsing.from_mapping(Adapters, meta["adapters"])
  return meta["task"], config, adapters


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
  adapters: str | Path | None = None,
) -> Loaded:
  """Reads the model of a checkpoint, each variable onto its own shards.

  Variables keep the dtype that they were saved in. A checkpoint of adapters is
  read onto the base that it was trained on.

  Args:
    path: see `step_directory`.
    mesh: all devices along `data` by default.
    dtype: compute dtype of the returned model.
    weights: eight bits for the decoder's weights, for inference only.
    adapters: a checkpoint of adapters for `path`, the base.

  Raises:
    CheckpointError: no checkpoint there, a leaf that does not fit, adapters of
      another base, or no decoder for `weights`.
  """
  found = describe(path)
  if found.adapters is not None:
    if adapters is not None:
      raise CheckpointError(
        f"{found.path} holds adapters; give their base as the checkpoint."
      )
    path, adapters = found.adapters.base_path, path
    found = _base_of(path, found)
  if weights is not None and not found.is_whole:
    raise CheckpointError(
      f"checkpoint {found.path} holds an image tokenizer only; {weights} "
      "weights are for decoders."
    )
  mesh = mesh or sharding.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
  make = model_factory(found.task, found.config, dtype=dtype)
  graph, abstract = nnx.split(construct.abstract(make))
  model: Any = nnx.merge(graph, read_onto(found.path, abstract, mesh))
  if adapters is not None:
    return _with_adapters(found, model, describe(adapters), mesh, weights)
  if weights is not None:
    int8.quantize(model.llm, weights)
  return Loaded(found.task, found.config, found.meta, found.path, model)


def _base_of(path: str, adapters: Description) -> Description:
  try:
    return describe(path)
  except CheckpointError as error:
    raise CheckpointError(
      f"checkpoint {adapters.path} holds adapters for {path}, which cannot be "
      "opened here; give that base as --checkpoint and these as --adapters "
      f"({error})"
    ) from error


def _with_adapters(
  base: Description,
  model: nnx.Module,
  found: Description,
  mesh: Mesh,
  weights: int8.Weights | None,
) -> Loaded:
  """A base with the adapters of another checkpoint, and the parts that were
  trained in full beside them; settings and text tokenizer are the adapters'.
  """
  if found.adapters is None:
    raise CheckpointError(
      f"checkpoint {found.path} holds a whole model, not adapters; give it as "
      "the checkpoint."
    )
  refuse_other_base(base.path, lora.fingerprint(nnx.state(model)), found)
  config = found.adapters.lora
  graph, state = nnx.split(model)
  adapted = construct.abstract(
    lambda state: _adapted(nnx.merge(graph, state), config, None), state
  )
  trains = lora.trainable_filter(config, nnx.state(adapted))
  _, wanted, _ = nnx.split(adapted, trains, ...)
  values = read_onto(found.path, wanted, mesh)
  nnx.update(model, lora.without_adapters(values))
  model = _adapted(model, config, weights)
  nnx.update(model, values)
  return Loaded(
    found.task,
    base.config,
    found.meta,
    found.path,
    model,
    adapters=found.adapters,
  )


def _adapted(model, config: LoRAConfig, weights: int8.Weights | None):
  if weights is not None:
    int8.quantize(model.llm, weights)
  lora.adapt(model, config)
  return model


def refuse_other_base(
  path: str | Path, base: str, adapters: Description
) -> None:
  """Raises `CheckpointError` where adapters were trained on another base.

  Args:
    path: of the checkpoint that is used as the base.
    base: `lora.fingerprint` of its model.
    adapters: describes a checkpoint of adapters.
  """
  wanted = adapters.adapters
  if wanted is not None and base != wanted.base:
    raise CheckpointError(
      f"checkpoint {adapters.path} holds adapters for another base than "
      f"{path}: they were trained on {wanted.base_path}; give that one."
    )


def load_adapters(
  path: str | Path, *, mesh: Mesh
) -> tuple[Description, nnx.State]:
  """What a checkpoint of adapters holds, without its base.

  Raises:
    CheckpointError: no checkpoint of adapters there, or a leaf that does not
      fit.
  """
  found = describe(path)
  if found.adapters is None:
    raise CheckpointError(f"checkpoint {found.path} holds no adapters.")
  wanted = _abstract_state(found.task, found.config, found.adapters)
  return found, read_onto(found.path, wanted, mesh)


def _abstract_state(
  task: str, config: ModelConfig, adapters: Adapters | None
) -> nnx.State:
  """Shapes of what a checkpoint of a model, or of its adapters, holds."""
  make = model_factory(task, config)
  if adapters is None:
    return nnx.state(construct.abstract(make))
  model = construct.abstract(lambda: _adapted(make(), adapters.lora, None))
  trains = lora.trainable_filter(adapters.lora, nnx.state(model))
  _, wanted, _ = nnx.split(model, trains, ...)
  return wanted


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
      config, rngs=construct.Rngs(seed), dtype=dtype, param_dtype=param_dtype
    )

  return make


def structure_faults(step: Path) -> tuple[str, ...]:
  """Why a step cannot be restored, whatever its manifest says; empty if it can.

  Compares names and shapes with the model that its meta data describe, without
  reading arrays.
  """
  try:
    meta = read_meta(step)
    wanted = nnx.to_pure_dict(_abstract_state(*_described(meta)))
    compare(wanted, stored_tree(step / "model"), step)
    if (step / "optimizer").exists():
      stored_tree(step / "optimizer")
  except (CheckpointError, ConfigError) as error:
    return (str(error),)
  except (KeyError, TypeError, ValueError) as error:
    return (str(_unreadable_meta(step, error)),)
  return ()
