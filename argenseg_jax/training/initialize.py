"""What a training run takes from the checkpoint that it starts from."""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, config_parsing, sharding, variants
from argenseg_jax.config import ConfigError, LoRAConfig, RunConfig
from argenseg_jax.data.text import TextTokenizer
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import int8, lora
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path


def model_config(config: RunConfig, init_from: str | None) -> ModelConfig:
  """The model that a run trains: a named variant, or that of `init_from`.

  Raises:
    ConfigError: neither is given.
    CheckpointError: `init_from` is no checkpoint.
  """
  changes = config.model.changes()
  if config.model.variant:
    return variants.get(config.model.variant, changes)
  if init_from is None:
    raise ConfigError(
      "config key 'model.variant' is empty, which takes the model of "
      "'init_from', and that is empty too."
    )
  return config_parsing.replace(checkpoint.describe(init_from).config, changes)


def require_model(task: str, init_from: str | None) -> None:
  """Raises ConfigError unless `init_from` holds a whole model.

  Args:
    task: that starts from it.
    init_from: a checkpoint, or none.
  """
  if init_from is None or not checkpoint.describe(init_from).is_whole:
    raise ConfigError(
      f"task {task!r} starts from a model that segments already: set config "
      "key 'init_from' to the checkpoint of a whole model, or train 'mllm' "
      "before it."
    )


def text_tokenizer(
  config: RunConfig, model: ModelConfig, init_from: str | None
) -> TextTokenizer:
  """The one that the data name, else that of a whole model in `init_from`,
  else the shipped one.

  Raises:
    DataError: it cannot be read, or gives the special tokens other ids than
      `model`.
  """
  path = config.data.text_tokenizer
  if path is None and init_from is not None:
    found = checkpoint.describe(init_from)
    if found.is_whole:
      return checkpoint.text_tokenizer(found)
  tokenizer = TextTokenizer(path, first_code=model.token_ids.first_code)
  tokenizer.require(model.token_ids)
  return tokenizer


def constructor(
  config: RunConfig, task: str, kind: str, model: ModelConfig
) -> Callable[[], nnx.Module]:
  """Makes what a task trains, as it is before the first step.

  Args:
    config: of the run.
    task: its name, a key of `RunConfig`.
    kind: what it trains, a key of `checkpoint.MODELS`.
    model: sizes.
  """
  train, adapters = config.stage(task).train, config.adapters(task)
  make = checkpoint.model_factory(
    kind,
    model,
    seed=config.seed,
    dtype=jnp.dtype(train.compute_dtype),
    param_dtype=jnp.dtype(train.param_dtype),
  )
  if adapters is None:
    return make
  return lambda: _adapted(make(), adapters, train.param_dtype, config.seed)


def _adapted(
  model: nnx.Module, config: LoRAConfig, param_dtype: str, seed: int
) -> nnx.Module:
  """Turns a whole model into a frozen base with fresh adapters, in place.

  What trains in full is kept in `param_dtype`, the image tokenizer, whose codes
  are the targets, in float32.
  """
  full = lora.trainable_filter(config, nnx.state(model))
  if config.base == "int8":
    # Only a whole model has adapters, see `RunConfig.adapters`.
    int8.quantize(typing.cast(ARGenSeg, model).llm, "int8")
  base = "float32" if config.base == "float32" else "bfloat16"
  state = nnx.state(model)

  def cast(path, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      if full(path, leaf):
        raise ConfigError(
          f"config key 'lora.train' names {'.'.join(map(str, path))}, which "
          "'lora.base' of int8 keeps in eight bits; use bfloat16 or leave it."
        )
      return leaf
    if isinstance(leaf, int8.Scale):
      return leaf
    dtype = param_dtype if full(path, leaf) else base
    if path[0] == "vqvae":
      dtype = "float32"
    return leaf.replace(leaf[...].astype(dtype))

  nnx.update(
    model,
    nnx.from_flat_state(
      [(path, cast(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    ),
  )
  lora.adapt(model, config, seed=seed)
  return model


@dataclasses.dataclass(frozen=True)
class Base:
  """A frozen model with fresh adapters, and what checkpoints say of it."""

  variables: nnx.State
  adapters: checkpoint.Adapters


def open_base(
  config: RunConfig,
  task: str,
  init_from: str | None,
  model: ModelConfig,
  mesh: Mesh,
) -> Base:
  """Reads the model that adapters are trained on, and quantizes it if asked.

  Raises:
    ConfigError: there is no whole model to start from, or a pattern of
      `config.lora` matches nothing.
    CheckpointError: it cannot be read.
  """
  adapters = config.adapters(task)
  found = None if init_from is None else checkpoint.describe(init_from)
  if adapters is None or found is None or not found.is_whole:
    raise ConfigError(
      "config key 'lora.rank' asks for adapters, which need a trained model "
      "under them: set 'init_from' to the checkpoint of a whole model."
    )
  if found.adapters is not None:
    raise ConfigError(
      f"config key 'init_from' names {init_from}, which contains adapters; "
      f"start from their base {found.adapters.base_path}, or from the two "
      "merged (`argenseg export --merge`, then import)."
    )
  if dataclasses.replace(found.config, name=model.name) != model:
    raise ConfigError(
      f"config keys 'model.variant' and 'model.overrides' describe another "
      f"model than {init_from}, the base of adapters; leave both empty."
    )
  train = config.stage(task).train
  loaded = checkpoint.load(
    found.path, mesh=mesh, dtype=jnp.dtype(train.compute_dtype)
  )
  graph, state = nnx.split(loaded.model)
  name = lora.fingerprint(state)

  def prepared(state):
    model = nnx.merge(graph, state)
    return nnx.state(_adapted(model, adapters, train.param_dtype, config.seed))

  abstract = jax.eval_shape(prepared, state)
  variables = jax.jit(
    prepared,
    donate_argnums=0,
    out_shardings=sharding.state_shardings(abstract, mesh),
  )(state)
  where = str(paths.absolute(paths.as_path(found.path)))
  return Base(variables, checkpoint.Adapters(name, where, adapters))


def fill(variables: nnx.State, path: str, model: str, mesh: Mesh) -> nnx.State:
  """Puts a checkpoint's variables in, in the dtypes of `variables`.

  An image tokenizer fills its part of a whole model, and takes its part of one.
  Adapters are merged into their base.

  Args:
    variables: of the model; they are replaced.
    path: of the checkpoint.
    model: what `variables` are of, a key of `checkpoint.MODELS`.
    mesh: that they live on.

  Raises:
    CheckpointError: a variable does not fit.
  """
  loaded = checkpoint.load(path, mesh=mesh)
  lora.merge(loaded.model)
  values = nnx.to_pure_dict(nnx.state(loaded.model))
  if model in values:
    values = values[model]
  elif model != loaded.task:
    values = {loaded.task: values}
  target = nnx.to_pure_dict(variables)
  checkpoint.compare(
    {k: target[k] for k in values if k in target}, values, loaded.path
  )
  values = {
    k: jax.tree.map(lambda v, t: v.astype(t.dtype), v, target[k])
    for k, v in values.items()
  }
  nnx.replace_by_pure_dict(variables, target | values)
  return variables


def keep_files(init_from: str, workdir: Path) -> None:
  """Hands on what import kept of a whole model for export, once."""
  found = checkpoint.describe(init_from)
  kept = checkpoint.kept_files(found.path)
  mine = workdir / kept.name
  if found.is_whole and kept.is_dir() and not mine.exists():
    paths.copy_tree(kept, mine)
