"""Orbax checkpoints: what a step directory holds, saving, restoring, loading.

A step holds three items: `model` (every variable of the model), `optimizer`
(moments and counters) and `meta` (JSON: task, resolved model, run config, data
state, format). Evaluation and prediction read `model` and `meta` only. Its
manifest tells damage before anything is read (see `integrity`).
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from argenseg_jax import config as config_lib
from argenseg_jax import distributed, integrity, sharding
from argenseg_jax.config import MeshConfig, ModelConfig
from argenseg_jax.data import text
from argenseg_jax.models import quantized
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.vqvae import VQVAE

FORMAT = 1
DAMAGED = "damaged_checkpoints"  # In a work directory: steps put aside.
_FULL = os.strerror(errno.ENOSPC)
KEPT = "torch"  # In a work directory: files of a PyTorch folder, for export.


class CheckpointError(ValueError):
  """A checkpoint that cannot be used; the message says which and why."""


class _Manager(ocp.CheckpointManager):
  """One that leaves preemption to `stopping`.

  Orbax would ask JAX, by the number of the step, whether hosts agreed to stop
  there. `stopping` asks by a count of its own, JAX compares both with one
  number, and hosts could stop at different steps.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class Checkpoints:
  """The checkpoints of one work directory, newest kept.

  Args:
    workdir: holds them in `checkpoints`.
    keep: how many.
    keep_every: steps that are multiples of it stay too; 0 keeps none.
    keep_best: so many with the highest score (see `save`) stay too.
    concurrent_gb: most gigabytes that wait in host memory to be written; no
      single variable may be larger.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    keep: int = 1,
    keep_every: int = 0,
    keep_best: int = 0,
    concurrent_gb: float = 96,
  ):
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    self._manager = _Manager(
      self.directory,
      item_handlers={
        "model": ocp.StandardCheckpointHandler(
          save_concurrent_gb=concurrent_gb
        ),
        "optimizer": ocp.StandardCheckpointHandler(
          save_concurrent_gb=concurrent_gb
        ),
        "meta": ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_retention(keep, keep_every, keep_best),
        best_fn=_score if keep_best else None,
        create=True,
        cleanup_tmp_directories=True,  # What a killed save has left.
        async_options=ocp.AsyncOptions(post_finalization_callback=self._sign),
      ),
    )
    self._saving = -1

  def newest_good(self) -> int | None:
    """The newest step without damage; None where nothing was saved.

    Newer ones, all damaged, are put aside in `damaged_checkpoints` of the work
    directory, so that their steps can be saved again.

    Raises:
      CheckpointError: there are steps, and all are damaged.
    """
    none, all_damaged = -1, -2
    steps = sorted(self._manager.all_steps(), reverse=True)
    chosen = all_damaged if steps else none
    if distributed.is_main():
      chosen = next(
        (s for s in steps if not integrity.faults(self.directory / str(s))),
        chosen,
      )
      for step in (s for s in steps if s > chosen >= 0):
        self._put_aside(step)
    chosen = distributed.from_main(chosen)
    if chosen == all_damaged:
      raise CheckpointError(_all_damaged(self.directory))
    self._manager.reload()
    return None if chosen == none else chosen

  def _put_aside(self, step: int) -> None:
    source = self.directory / str(step)
    aside = self.directory.parent / DAMAGED
    aside.mkdir(exist_ok=True)
    count = sum(
      path.name.split(".")[0] == source.name for path in aside.iterdir()
    )
    target = aside / (f"{step}.{count}" if count else f"{step}")
    _warn(f"{_damage(source)}; moved to {target}, an older one is used.")
    source.rename(target)

  def _sign(self) -> None:
    """Orbax calls this on one host when all files of a step are written, before
    the step gets its final name."""
    for directory in self.directory.iterdir():
      if directory.name.split(".")[0] == str(self._saving):
        integrity.sign(directory)

  def save(
    self,
    step: int,
    model: nnx.State,
    optimizer: Any,
    meta: dict[str, Any],
    *,
    score: float | None = None,
  ) -> None:
    """Starts an asynchronous save; an existing step is left as it is.

    Without an `optimizer` (imported weights) the step is a starting point,
    which `load` opens and `restore` does not. A step is among the best only by
    a finite `score`; higher is better.
    """
    if step in self._manager.all_steps():
      return
    items = {
      "model": ocp.args.StandardSave(nnx.to_pure_dict(model)),
      "meta": ocp.args.JsonSave(meta | {"format": FORMAT}),
    }
    if optimizer is not None:
      items["optimizer"] = ocp.args.StandardSave(_flat(optimizer))
    self.wait()  # `_sign` of the last save has run.
    self._saving = step
    scored = score is not None and math.isfinite(score)
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(**items),
        metrics={"score": float(score)} if scored else None,
      )

  def restore(
    self, step: int, model: nnx.State, optimizer: Any
  ) -> tuple[nnx.State, Any, dict[str, Any]]:
    """Restores a step onto the shardings of `model` and `optimizer`.

    Args:
      step: one of this directory's steps.
      model: abstract or concrete variables, with shardings.
      optimizer: likewise.

    Raises:
      CheckpointError: a leaf is missing, unexpected or of another shape.
    """
    where = self.directory / str(step)
    _read_meta(where)  # Refuses another format.
    wanted_model = nnx.to_pure_dict(_abstract(model))
    wanted_optimizer = _flat(_abstract(optimizer))
    for name, wanted in (
      ("model", wanted_model),
      ("optimizer", wanted_optimizer),
    ):
      compare(wanted, _stored(where / name), where, dtypes=True)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardRestore(wanted_model),
        optimizer=ocp.args.StandardRestore(wanted_optimizer),
        meta=ocp.args.JsonRestore(),
      ),
    )
    leaves = list(restored.optimizer.values())
    optimizer = jax.tree.unflatten(jax.tree.structure(optimizer), leaves)
    return _with_values(model, restored.model), optimizer, restored.meta

  def wait(self) -> None:
    """Blocks until running saves are on disk.

    Raises:
      CheckpointError: one could not be written, perhaps to a full disk.
    """
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore have kinds of their own.
      said = str(error).strip() or type(error).__name__
      if _FULL in said:
        said = _FULL
      raise CheckpointError(
        f"cannot write checkpoint {self.directory / str(self._saving)}: "
        f"{said.splitlines()[0].rstrip('.')}; earlier ones are as they were. "
        "Make room or mend the disk and start again."
      ) from error


def _score(metrics: Any) -> float:
  return metrics["score"]


def _retention(keep: int, keep_every: int, keep_best: int):
  policy = ocp.checkpoint_managers
  policies = [policy.LatestN(keep)]
  if keep_every:
    policies.append(policy.EveryNSteps(keep_every))
  if keep_best:
    policies.append(
      policy.BestN(
        get_metric_fn=_score,
        n=keep_best,
        keep_checkpoints_without_metrics=False,
      )
    )
  return policy.AnyPreservationPolicy(policies)


@dataclasses.dataclass(frozen=True)
class Description:
  """What a step says of itself; `path` is its directory."""

  task: str
  config: ModelConfig
  meta: dict[str, Any]
  path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Loaded(Description):
  """A model read for evaluation, prediction or as a starting point."""

  model: nnx.Module


def step_directory(path: str | pathlib.Path) -> pathlib.Path:
  """The newest undamaged step under a work directory or checkpoint directory; a
  step directory itself.

  Raises:
    CheckpointError: nothing there is a checkpoint, or none is undamaged.
  """
  root = pathlib.Path(path).absolute()
  if not root.exists():
    raise CheckpointError(f"checkpoint {path} does not exist.")
  if root.name.isdigit() or (root / "meta").is_dir():
    if integrity.faults(root):
      raise CheckpointError(
        f"{_damage(root)}; use another step, or read it as it is with "
        "--skip_verification."
      )
    return root
  for directory in (root / "checkpoints", root):
    if directory.is_dir():
      steps = [d for d in directory.iterdir() if d.name.isdigit()]
      for step in sorted(steps, key=lambda d: int(d.name), reverse=True):
        if not integrity.faults(step):
          return step
        _warn(f"{_damage(step)}; looking for an older one.")
      if steps:
        raise CheckpointError(_all_damaged(directory))
  raise CheckpointError(
    f"{path} holds no checkpoint; give a work directory of `argenseg train` or "
    "`argenseg quickstart`, or one of its checkpoints/STEP directories."
  )


def _damage(step: pathlib.Path) -> str:
  found = integrity.faults(step)
  more = f" and {len(found) - 2} more" if len(found) > 2 else ""
  return f"checkpoint {step} is damaged: {', '.join(found[:2])}{more}"


def _all_damaged(directory: pathlib.Path) -> str:
  return (
    f"every checkpoint in {directory} is damaged (`argenseg checkpoint verify` "
    "lists the faults); put a good copy there or use another directory."
  )


@functools.cache  # Once each.
def _warn(sentence: str) -> None:
  print(sentence, file=sys.stderr, flush=True)


def text_tokenizer_path(step: pathlib.Path) -> pathlib.Path:
  """The tokenizer.json that lies beside the checkpoints of a work directory."""
  return step.parent.parent / "tokenizer.json"


def kept_files(step: pathlib.Path) -> pathlib.Path:
  """Where import keeps the files of a PyTorch folder; it may be absent."""
  return step.parent.parent / KEPT


def text_tokenizer(found: Description) -> text.TextTokenizer:
  """The text tokenizer of a whole model.

  Raises:
    CheckpointError: there is none beside the checkpoint.
    DataError: it is of another model.
  """
  path = text_tokenizer_path(found.path)
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


def describe(path: str | pathlib.Path) -> Description:
  """Reads the meta data of a checkpoint; see `step_directory` for `path`.

  Raises:
    CheckpointError: no checkpoint there, or none of this format.
  """
  where = step_directory(path)
  meta = _read_meta(where)
  try:
    config = config_lib.from_mapping(ModelConfig, meta["model"])
    task = meta["task"]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _unreadable_meta(where, error) from error
  return Description(task, config, meta, where)


def _read_meta(step: pathlib.Path) -> dict[str, Any]:
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


def _unreadable_meta(step: pathlib.Path, error: Exception) -> CheckpointError:
  return CheckpointError(
    f"checkpoint {step} has unreadable meta data ({error})."
  )


def load(
  path: str | pathlib.Path,
  *,
  mesh: Mesh | None = None,
  dtype: DTypeLike = jnp.float32,
  weights: quantized.Weights | None = None,
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
  if weights is not None and found.task == "vqvae":
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
  stored = _stored(found.path / "model")
  compare(wanted, stored, found.path)
  saved = _by_name(stored)
  wanted = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.update(dtype=saved[_name(path)].dtype), wanted
  )
  with ocp.StandardCheckpointer() as reader:
    values = reader.restore(found.path / "model", wanted)
  model = nnx.merge(graph, _with_values(abstract, values))
  if weights is not None:
    quantized.quantize(model.llm, weights)
  return Loaded(found.task, found.config, found.meta, found.path, model)


def stored_variables(step: pathlib.Path) -> dict[str, Any]:
  """Shape, dtype and sharding of a step's variables, by dotted name; without
  reading them."""
  return _by_name(_stored(step / "model"))


def read_variables(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The variables of a checkpoint by dotted name, all in host memory.

  Raises:
    CheckpointError: see `step_directory`.
  """
  item = step_directory(path) / "model"
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    _stored(item),
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
  """A constructor without arguments for the module that `task` trains."""

  def make():
    kwargs = dict(rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=param_dtype)
    if task == "vqvae":
      return VQVAE(config.vqvae, **kwargs)
    return ARGenSeg(config, **kwargs)

  return make


def _flat(tree: Any) -> dict[str, Any]:
  """Leaves by key path, in flattening order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    f"{i:04d}{jax.tree_util.keystr(path)}": leaf
    for i, (path, leaf) in enumerate(leaves)
  }


def _stored(item: pathlib.Path) -> Any:
  """Shapes and dtypes of an item on disk."""
  with ocp.StandardCheckpointer() as reader:
    return reader.metadata(item).item_metadata.tree


def _abstract(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def _with_values(state: nnx.State, values: dict[str, Any]) -> nnx.State:
  state = jax.tree.map(lambda x: x, state)
  nnx.replace_by_pure_dict(state, values)
  return state


def compare(
  wanted: Any, found: Any, where: pathlib.Path, *, dtypes: bool = False
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
