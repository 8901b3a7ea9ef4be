"""What a training run takes from the checkpoint that it starts from."""

import jax
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, config_parsing, variants
from argenseg_jax.config import ConfigError, ModelConfig, RunConfig
from argenseg_jax.data.text import TextTokenizer
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


def fill(variables: nnx.State, path: str, model: str, mesh: Mesh) -> nnx.State:
  """Puts a checkpoint's variables in, in the dtypes of `variables`.

  An image tokenizer fills its part of a whole model, and takes its part of one.

  Args:
    variables: of the model; they are replaced.
    path: of the checkpoint.
    model: what `variables` are of, a key of `checkpoint.MODELS`.
    mesh: that they live on.

  Raises:
    CheckpointError: a variable does not fit.
  """
  loaded = checkpoint.load(path, mesh=mesh)
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
