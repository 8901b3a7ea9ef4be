"""Saving and restoring the checkpoints of a run."""

import contextlib
import errno
import functools
import logging
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from argenseg_jax.checkpoint import layout, manifest
from argenseg_jax.checkpoint.layout import (
  DAMAGED,
  CheckpointError,
  damage,
  every_is_damaged,
  warn,
)
from argenseg_jax.checkpoint.load import FORMAT, read_meta
from argenseg_jax.checkpoint.variables import compare, stored_tree, with_values
from argenseg_jax.runtime import distributed, paths

# What a file system says when it takes no more, wherever that stands in the
# errors of Orbax and TensorStore.
_REASONS = tuple(
  os.strerror(number)
  for number in (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EIO),
  )
)


@functools.cache  # Once.
def _leave_failures_to_us() -> None:
  """A failed save is one sentence of ours. Orbax logs a traceback for each
  array and closes its event loop while others are still being written: Python
  then logs each of those that fails, and TensorStore's threads print that
  they find the loop closed."""
  logging.getLogger("absl").addFilter(
    lambda record: "orbax" not in record.pathname
  )
  logging.getLogger("asyncio").addFilter(
    lambda record: "orbax" not in record.getMessage()
  )
  before, unraisable_before = sys.excepthook, sys.unraisablehook

  def hook(kind, error, trace) -> None:
    if not _is_about_a_closed_loop(error):
      before(kind, error, trace)

  def unraisable_hook(unraisable) -> None:
    if not _is_about_a_closed_loop(unraisable.exc_value):
      unraisable_before(unraisable)

  sys.excepthook, sys.unraisablehook = hook, unraisable_hook


def _is_about_a_closed_loop(error: BaseException | None) -> bool:
  return (
    isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
  )


class _Manager(ocp.CheckpointManager):
  """One that leaves preemption to `preemption`.

  Orbax would ask JAX, by the number of the step, whether hosts agreed to stop
  there. `preemption` asks by a count of its own, JAX compares both with one
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
    workdir: str | paths.Path,
    *,
    keep: int = 1,
    keep_every: int = 0,
    keep_best: int = 0,
    concurrent_gb: float = 96,
  ):
    workdir = paths.absolute(paths.as_path(workdir))
    if "\\" in str(workdir):  # TensorStore would write elsewhere.
      raise CheckpointError(
        f"checkpoints cannot be kept in {workdir}: give a path without "
        "backslashes."
      )
    _leave_failures_to_us()
    self.directory = layout.steps_directory(workdir)
    self._manager = _Manager(
      self.directory,
      item_handlers={
        "model": ocp.StandardCheckpointHandler(
          save_concurrent_gb=concurrent_gb  # pyright: ignore[reportArgumentType]
        ),
        "optimizer": ocp.StandardCheckpointHandler(
          save_concurrent_gb=concurrent_gb  # pyright: ignore[reportArgumentType]
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
        (s for s in steps if not manifest.faults(self.directory / str(s))),
        chosen,
      )
      for step in (s for s in steps if s > chosen >= 0):
        self._put_aside(step)
    chosen = distributed.from_main(chosen)
    if chosen == all_damaged:
      raise CheckpointError(every_is_damaged(self.directory))
    self._manager.reload()
    return None if chosen == none else chosen

  def _put_aside(self, step: int) -> None:
    source = self.directory / str(step)
    aside = self.directory.parent / DAMAGED
    aside.mkdir(exist_ok=True)
    count = sum(
      path.name.split(".")[0] == source.name for path in aside.glob("*")
    )
    target = aside / (f"{step}.{count}" if count else f"{step}")
    warn(f"{damage(source)}; moved to {target}, an older one is used.")
    paths.move(source, target)

  def _sign(self) -> None:
    """Orbax calls this on one host when all files of a step are written, before
    the step gets its final name."""
    for directory in self.directory.iterdir():
      if directory.name.split(".")[0] == str(self._saving):
        manifest.sign(directory, layout.beside(directory))

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
    metrics = None
    if score is not None and math.isfinite(score):
      metrics = {"score": float(score)}
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(**items),
        metrics=metrics,
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
    read_meta(where)  # Refuses another format.
    wanted_model = nnx.to_pure_dict(_abstract(model))
    wanted_optimizer = _flat(_abstract(optimizer))
    for name, wanted in (
      ("model", wanted_model),
      ("optimizer", wanted_optimizer),
    ):
      compare(wanted, stored_tree(where / name), where, dtypes=True)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardRestore(wanted_model),
        optimizer=ocp.args.StandardRestore(wanted_optimizer),
        meta=ocp.args.JsonRestore(),
      ),
    )
    leaves = list(restored["optimizer"].values())
    optimizer = jax.tree.unflatten(jax.tree.structure(optimizer), leaves)
    return with_values(model, restored["model"]), optimizer, restored["meta"]

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
      said = next((reason for reason in _REASONS if reason in said), said)
      raise CheckpointError(
        f"cannot write checkpoint {self.directory / str(self._saving)}: "
        f"{said.splitlines()[0].rstrip('.')}; earlier ones are as they were. "
        "Free up space (or fix the disk), then rerun the same command."
      ) from error


def _score(metrics: Any) -> float:
  return metrics["score"]


def _retention(keep: int, keep_every: int, keep_best: int):
  policy = ocp.checkpoint_managers
  policies: list[Any] = [policy.LatestN(keep)]
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


def _flat(tree: Any) -> dict[str, Any]:
  """Leaves by key path, in flattening order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    f"{i:04d}{jax.tree_util.keystr(path)}": leaf
    for i, (path, leaf) in enumerate(leaves)
  }


def _abstract(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
