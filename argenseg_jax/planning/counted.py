"""What can be said of a training step without compiling it.

Memory is counted from below: what a device holds all the time, gradients, and
activations that a remat policy keeps. What the compiler adds (gathered weights,
scratch) is left out, so that nothing that fits is turned away. Times are bounds
at published rates.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from argenseg_jax import sharding
from argenseg_jax.config import RunConfig
from argenseg_jax.kernels import chips
from argenseg_jax.model_config import LLMConfig, ModelConfig
from argenseg_jax.models import flops, remat
from argenseg_jax.planning import programs
from argenseg_jax.planning.topology import Topology
from argenseg_jax.training import initialize
from argenseg_jax.training.step import require_equal_parts
from argenseg_jax.training.tasks import TASKS, Task


class Counted(NamedTuple):
  """A step before it is compiled.

  Attributes:
    memory: bytes of a device, at least.
    work: FLOPs of the step, recomputed ones included.
    items: tokens of a step, or its rows where a row has no tokens.
    seconds: that it takes at least; None where no rates are published.
  """

  memory: int
  work: float
  items: int
  seconds: float | None

  @property
  def speed(self) -> float:
    """Items a second; a FLOP, where no rates are published."""
    return self.items / (self.work if self.seconds is None else self.seconds)


class _State(NamedTuple):
  """Of a device: bytes held all the time, numbers that train; of the whole
  model: numbers that fsdp splits, trained and frozen."""

  held: int
  trained: int
  split: int
  split_frozen: int


def count(config: RunConfig, name: str, topology: Topology) -> Counted:
  """Memory and time of a task's step, from below.

  Args:
    config: of the run.
    name: of the task, a key of `TASKS`.
    topology: that it would run on.

  Raises:
    config.ConfigError: mesh, batch or a parameter's dimension do not fit.
  """
  task, stage = TASKS[name], config.stage(name)
  task.check(config)
  mesh = sharding.abstract_mesh(
    config.mesh, topology.num_devices, topology.slices
  )
  require_equal_parts(stage.train, mesh)
  model = initialize.model_config(config, config.init_from)
  state = _state(without_sizes(config, name), name, mesh)
  kept = kept_activations(config, task, model, topology, mesh)
  waiting = sum(kept.values())
  gradients = state.trained * _gradient_bytes(config, name)
  if stage.train.accumulate_steps > 1:  # Sums wait while a turn works.
    memory = state.held + gradients + waiting
  else:
    memory = state.held + max(gradients, waiting)
  work = work_of(config, task, model, topology, mesh)
  seconds = None
  if work.seconds:
    seconds = max(work.seconds.values())
    seconds += sum(
      _traffic(config, task, model, topology, mesh, state).values()
    )
  rows = stage.train.global_batch_size
  return Counted(
    memory,
    work.step.total,
    rows * max(task.data(config.data).sequence_length, 1),
    seconds,
  )


def without_sizes(config: RunConfig, name: str) -> RunConfig:
  """The config without batch, turns, remat and tokenized masks: two that are
  equal hold equal states."""
  stage = config.stage(name)
  stage = dataclasses.replace(
    stage,
    train=dataclasses.replace(
      stage.train,
      steps=2**30,
      global_batch_size=1,
      accumulate_steps=1,
      remat="full",
    ),
    optimizer=dataclasses.replace(stage.optimizer, warmup_steps=0),
  )
  data = dataclasses.replace(config.data, cache_codes=False)
  return dataclasses.replace(config, data=data, **{name: stage})


@functools.lru_cache(maxsize=256)
def _state(config: RunConfig, name: str, mesh) -> _State:
  state = programs.describe_training(config, name, mesh).state
  parts = programs.state_parts(state).values()
  return _State(
    sum(programs.device_bytes(part) for part in parts if part is not None),
    sum(
      math.prod(x.sharding.shard_shape(x.shape))
      for x in jax.tree.leaves(state.params)
    ),
    *(
      sum(
        math.prod(variable.shape)
        for _, variable in nnx.to_flat_state(variables)
        if sharding.is_split(variable)
      )
      for variables in (state.params, state.fixed)
    ),
  )


def kept_activations(
  config: RunConfig,
  task: Task,
  model: ModelConfig,
  topology: Topology,
  mesh: sharding.AnyMesh,
) -> dict[str, int]:
  """Bytes that the decoder's layers keep for the backward pass, on one device.

  These are the layers' inputs and what the remat policy names; with "none" also
  what products read. Attention's result counts where its kernel keeps it.
  Nothing for tasks without a decoder.
  """
  stage = config.stage(task.name)
  train = stage.train
  if not task.reads_text:
    return {}
  parts = train.accumulate_steps * sharding.num_shards(mesh)
  sequences = train.global_batch_size // parts * stage.sequences_per_row
  length = config.data.sequence_length
  number = jnp.dtype(train.compute_dtype).itemsize
  whole = sequences * length * number * model.llm.num_layers
  found = {"layer inputs": whole * model.llm.width}
  policy = remat.POLICIES[train.remat]
  if not policy.offloads:
    widths = _widths(model.llm, mesh.shape["tensor"])
    on_tpu = topology.name in chips.TPUS and mesh.shape["tensor"] == 1
    found |= {
      name: whole * widths[name]
      for name in policy.keeps
      if name != remat.ATTENTION or on_tpu or train.remat == "none"
    }
  if train.remat == "none":
    mlp = model.llm.mlp_width // mesh.shape["tensor"]
    found["product inputs"] = whole * (2 * model.llm.width + mlp)
  return found


def _widths(llm: LLMConfig, tensor: int) -> dict[str, int]:
  """Numbers of a position that a device holds of each `remat.VALUES`."""
  heads = llm.num_heads * llm.head_dim
  both = 2 * llm.num_kv_heads * llm.head_dim
  return {
    remat.QKV: (heads + both) // tensor,
    remat.ATTENTION: heads // tensor,
    remat.MLP_INPUT: llm.width,
    remat.MLP_HIDDEN: 2 * llm.mlp_width // tensor,
  }


def _gradient_bytes(config: RunConfig, name: str) -> int:
  """Bytes of a number of the gradient while a step works, at least."""
  train = config.stage(name).train
  if train.accumulate_steps > 1:
    return 4
  return min(
    jnp.dtype(train.compute_dtype).itemsize,
    jnp.dtype(train.param_dtype).itemsize,
  )


class Work(NamedTuple):
  """What a step computes, however it is compiled.

  Attributes:
    step: its FLOPs.
    passes: of the products of one row.
    hbm_bytes: that a device reads and writes, at least.
    seconds: by what they are spent on, at published rates; empty without.
  """

  step: flops.Step
  passes: tuple[flops.Pass, ...]
  hbm_bytes: float
  seconds: dict[str, float]


def work_of(
  config: RunConfig,
  task: Task,
  model: ModelConfig,
  topology: Topology,
  mesh: sharding.AnyMesh,
) -> Work:
  """FLOPs and memory traffic of a step, and what they take at least."""
  stage = config.stage(task.name)
  products = tuple(task.products(model, task.data(config.data), config))
  kinds = {"constant": task.constant, "adapters": config.adapters(task.name)}
  step = flops.train_step(products, stage, **kinds)
  moved = flops.hbm_bytes(
    products,
    stage,
    parts=sharding.num_shards(mesh),
    fsdp=mesh.shape["fsdp"],
    **kinds,
  )
  seconds = {}
  if chip := topology.chip:
    seconds["compute"] = step.total / (chip.flops * topology.num_chips)
    seconds["hbm"] = moved / (chip.bandwidth / chip.devices)
  passes = tuple(flops.training_passes(products, stage, **kinds))
  return Work(step, passes, moved, seconds)


def _traffic(
  config: RunConfig,
  task: Task,
  model: ModelConfig,
  topology: Topology,
  mesh: sharding.AnyMesh,
  state: _State,
) -> dict[str, float]:
  """Seconds of what must travel between chips: weights gathered for both
  passes of a turn, gradients scattered, sums over copies, and a layer's sums
  over `tensor`."""
  train, chip = config.stage(task.name).train, topology.chip
  assert chip is not None
  turns, number = (
    train.accumulate_steps,
    jnp.dtype(train.compute_dtype).itemsize,
  )
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]

  def share(parts):
    return (parts - 1) / parts

  gathered = turns * (3 * state.split + 2 * state.split_frozen)
  sent = gathered * number / tensor * share(fsdp)
  summed = 2 * state.trained * _gradient_bytes(config, task.name)
  sent += summed * share(mesh.shape["data"])
  if task.reads_text:
    parts = sharding.num_shards(mesh)
    rows = train.global_batch_size / parts
    rows *= config.stage(task.name).sequences_per_row
    layer = rows * config.data.sequence_length * model.llm.width * number
    # Attention and MLP each end with a sum, and begin with one of gradients;
    # what is recomputed is summed again.
    sums = 4 if train.remat != "full" else 6
    sent += sums * 2 * share(tensor) * layer * model.llm.num_layers
  seconds = {"links": sent / (chip.links / chip.devices / 2)}
  if topology.slices > 1 and chip.dcn is not None:
    seconds["dcn"] = summed * share(topology.slices) / chip.dcn
  return seconds
