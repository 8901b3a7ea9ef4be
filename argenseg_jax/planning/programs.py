"""Programs of a run compiled ahead of time for hardware that you don't have."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, construct, sharding
from argenseg_jax.config import RunConfig, TrainConfig
from argenseg_jax.inference.segment import answer_batch
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.training import initialize
from argenseg_jax.training import state as train_state
from argenseg_jax.training.step import make_train_step
from argenseg_jax.training.tasks import TASKS, Task
from argenseg_jax.types import Batch

_PROMPT_TEXT = 64  # Text tokens of a prompt, in the plan of generation.


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, or why it is none.

  Attributes:
    parts: bytes a device holds all the time, by kind.
    compiled: None if it needs more memory than there is.
    excess: then, the compiler's own words.
    split_shapes: of whole matrices that fsdp splits, one layer each.
  """

  parts: dict[str, int]
  compiled: jax.stages.Compiled | None
  excess: str
  split_shapes: tuple[tuple[int, ...], ...]


def abstract_batch(config: RunConfig, model: ModelConfig, task: Task) -> Batch:
  """Shapes and dtypes of a global batch."""
  data = task.data(config.data)
  b = config.stage(task.name).train.global_batch_size
  t, i = data.sequence_length, data.max_images * data.pack
  m = data.max_masks * data.pack
  codes = model.vqvae.codes_per_mask

  def make(dtype, *shape):
    return jax.ShapeDtypeStruct((b, *shape), jnp.dtype(dtype))

  ids = make("int32", t)
  return Batch(
    tokens=ids,
    targets=ids,
    positions=ids,
    segment_ids=ids,
    is_prompt=make("bool", t),
    images=make("uint8", i, data.image_side, data.image_side, 3),
    seg_masks=make(
      "uint8", m, data.mask_side, data.mask_side, data.mask_channels
    ),
    mask_valid=make("bool", m),
    codes=make("int32", m, codes * data.tokenized),
    sample_weight=make("float32"),
    sample_id=make("int32"),
  )


def describe_training(
  config: RunConfig, name: str, mesh: sharding.AnyMesh
) -> train_state.Described:
  """State of a run as shapes and shards, from its config alone."""
  model = initialize.model_config(config, config.init_from)
  make = initialize.constructor(config, name, TASKS[name].model, model)
  return train_state.describe(
    *nnx.split(construct.abstract(make)),
    config.stage(name),
    num_codes=model.vqvae.num_codes,
    mesh=mesh,
    adapters=config.adapters(name),
  )


def state_parts(state: train_state.TrainState) -> dict[str, Any]:
  """What a device holds all the time, by the names of a report."""
  return {
    "parameters": state.params,
    "frozen parameters": state.fixed,
    "moments": state.optimizer,
    "average": state.average,
    "start": state.start,
  }


def compile_training(config: RunConfig, name: str, mesh: Mesh) -> Program:
  """The step of `argenseg train`, for devices that need not exist.

  Args:
    config: of the run.
    name: of the task, a key of `TASKS`.
    mesh: of those devices.

  Raises:
    config.ConfigError: mesh, batch or a parameter's dimension do not fit.
  """
  task, stage = TASKS[name], config.stage(name)
  task.check(config)
  sharding.check_hosts(mesh, stage.train.global_batch_size)
  model = initialize.model_config(config, config.init_from)
  described = describe_training(config, name, mesh)
  graph, optimizer, state, _ = described
  rows = sharding.batch_sharding(mesh)
  batch = abstract_batch(config, model, task)
  batch = sharding.placed(batch, jax.tree.map(lambda _: rows, batch))
  step = make_train_step(graph, optimizer, config, task, mesh=mesh)
  return _compile(
    jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(described.shardings, None),
      compiler_options=sharding.compiler_options(mesh),
    ),
    (state, batch),
    mesh,
    {**state_parts(state), "batch": batch},
    state.params,
  )


def compile_generation(config: RunConfig, mesh: Mesh) -> Program:
  """The program of `argenseg predict` and `eval`: prompt, text, masks."""
  model = initialize.model_config(config, config.init_from)
  graph, variables = _abstract_model("mllm", config.mllm.train, model)
  variables = sharding.placed(
    variables, sharding.state_shardings(variables, mesh)
  )
  b, side = config.eval.batch_size, config.data.image_side
  t = config.data.max_images * model.vision.num_embeddings + _PROMPT_TEXT
  rows = sharding.batch_sharding(mesh)
  if b % sharding.num_shards(mesh):
    rows = sharding.replicated(mesh)

  def make(dtype, *shape):
    return jax.ShapeDtypeStruct((b, *shape), jnp.dtype(dtype), sharding=rows)

  inputs = (
    make("int32", t),
    make("bool", t),
    make("uint8", config.data.max_images, side, side, 3),
  )

  def generate(variables, tokens, valid, images):
    bound = nnx.merge(graph, variables)
    assert isinstance(bound, ARGenSeg)
    return answer_batch(bound, tokens, valid, images, config=config.eval)

  return _compile(
    jax.jit(generate),
    (variables, *inputs),
    mesh,
    {"parameters": variables, "batch": inputs},
    variables,
  )


def _abstract_model(kind: str, train: TrainConfig, model: ModelConfig):
  make = checkpoint.model_factory(
    kind,
    model,
    dtype=jnp.dtype(train.compute_dtype),
    param_dtype=jnp.dtype(train.param_dtype),
  )
  return nnx.split(construct.abstract(make))


def _without_gpu(mesh: Mesh) -> dict[str, bool]:
  """XLA's options for a GPU that you don't have: Triton's products want sizes
  that only trials on a device find, and some have none that fit by default."""
  gpu = mesh.devices.flat[0].platform in ("cuda", "gpu")
  return {"xla_gpu_enable_triton_gemm": False} if gpu else {}


def _compile(function, arguments, mesh, parts, params) -> Program:
  compiled, excess = None, ""
  # The platform, not the machine that compiles, picks kernels.
  with jax.set_mesh(mesh):
    try:
      compiled = function.lower(*arguments).compile(_without_gpu(mesh))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      used = re.search(r"Used [^.]*\.\S* of \S+ \w+\.", str(error))
      excess = used[0] if used else str(error).splitlines()[0]
  return Program(
    parts={k: device_bytes(v) for k, v in parts.items() if v is not None},
    compiled=compiled,
    excess=excess,
    split_shapes=_split_shapes(params),
  )


def device_bytes(tree: Any) -> int:
  """Bytes that one device holds."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _split_shapes(params: nnx.State) -> tuple[tuple[int, ...], ...]:
  shapes = set()
  for _, variable in nnx.to_flat_state(params):
    if sharding.is_split(variable):
      stacked = "layers" in variable.get_metadata()["axes"]
      shape = tuple(sorted(variable.shape[stacked:]))
      if len(shape) > 1:  # Vectors of that length may rightly be whole.
        shapes.add(shape)
  return tuple(sorted(shapes))
