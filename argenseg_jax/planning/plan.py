"""What a run needs and costs on hardware that is not here.

The real training step (or the generation program) is compiled ahead of time for
a described topology; memory and collectives are the compiler's own. Times are
bounds from published figures (`kernels/chips.py`), not forecasts: nothing runs
at its peak.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, sharding
from argenseg_jax.config import ModelConfig, RunConfig, TrainConfig
from argenseg_jax.inference.segment import answer_batch
from argenseg_jax.kernels import chips
from argenseg_jax.models import flops
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.planning import hlo
from argenseg_jax.planning.topology import Topology
from argenseg_jax.training import initialize
from argenseg_jax.training import state as train_state
from argenseg_jax.training.step import make_train_step
from argenseg_jax.training.tasks import TASKS, Task
from argenseg_jax.types import Batch

# Elements. XLA for TPUs reduces smaller arrays whole on purpose: one phase is
# faster than two. On v5e:2x4 64 x 64 is all-reduced, 128 x 128 is not.
_SMALLEST_SCATTER = 128 * 128
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
  described = train_state.describe(
    *nnx.split(
      nnx.eval_shape(initialize.constructor(config, name, task.model, model))
    ),
    stage,
    num_codes=model.vqvae.num_codes,
    mesh=mesh,
    adapters=config.adapters(name),
  )
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
    {
      "parameters": state.params,
      "frozen parameters": state.fixed,
      "moments": state.optimizer,
      "average": state.average,
      "start": state.start,
      "batch": batch,
    },
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
  return nnx.split(nnx.eval_shape(make))


def _without_gpu(mesh: Mesh) -> dict[str, bool]:
  """XLA's options where the GPU is not here: Triton's products want sizes that
  only trials on a device find, and some have none that fit by default."""
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
    parts={k: _bytes(v) for k, v in parts.items() if v is not None},
    compiled=compiled,
    excess=excess,
    split_shapes=_split_shapes(params),
  )


def _bytes(tree: Any) -> int:
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


def report(
  program: Program, config: RunConfig, what: str, topology: Topology, mesh: Mesh
) -> dict[str, Any]:
  """Numbers of `argenseg plan`, JSON-ready; bytes and FLOPs are plain counts.

  Args:
    program: from `compile_training` or `compile_generation`.
    config: of the run.
    what: a key of `TASKS` (training it) or "generate".
    topology: that `mesh` stands for.
    mesh: compiled for.
  """
  model = initialize.model_config(config, config.init_from)
  result: dict[str, Any] = {
    "topology": str(topology),
    "what": what,
    "variant": model.name,
    "mesh": dict(mesh.shape),
    "fits": program.compiled is not None,
    "bytes": dict(program.parts),
  }
  chip = topology.chip
  if chip:
    result["hbm"] = chip.hbm // chip.devices
  if program.compiled is None:
    result["excess"] = program.excess
    result["change"] = changes(config, what, mesh)
    return result
  memory, text = program.compiled.memory_analysis(), program.compiled.as_text()
  assert memory is not None  # XLA always tells.
  assert text is not None
  result["bytes"]["temporary"] = memory.temp_size_in_bytes
  task = TASKS.get(what)
  if task:
    kept = kept_activations(config, task, model, mesh)
    if kept is not None:
      result["bytes"]["of it layer inputs"] = kept
  result["peak"] = _peak(memory)
  if chip:
    result["fits"] = result["peak"] <= result["hbm"]
    if not result["fits"]:
      result["change"] = changes(config, what, mesh)
  found = hlo.collectives(text)
  result["collectives"] = _summary(found, mesh)
  result["whole_gradients_all_reduced"] = [
    list(shape)
    for shape in hlo.reduced_whole(
      found,
      program.split_shapes,
      parts=mesh.shape["fsdp"],
      smallest=_SMALLEST_SCATTER if topology.name in chips.TPUS else 0,
    )
  ]
  if task:
    result |= _times(found, config, task, model, topology, mesh)
  return result


def _peak(memory) -> int:
  """Bytes in use at the worst moment."""
  return max(
    getattr(memory, "peak_memory_in_bytes", 0),
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
  )


def _crosses_slices(collective: hlo.Collective, mesh: Mesh) -> bool:
  size = mesh.size // mesh.shape["slice"]
  return len({device // size for device in collective.group}) > 1


def _summary(found: list[hlo.Collective], mesh: Mesh) -> dict[str, Any]:
  summary = {}
  for c in found:
    kind = c.kind + (" (DCN)" if _crosses_slices(c, mesh) else "")
    entry = summary.setdefault(kind, {"runs": 0, "bytes": 0, "largest": 0})
    entry["runs"] += c.runs
    entry["bytes"] += c.size * c.runs
    entry["largest"] = max(entry["largest"], c.size)
  return summary


def kept_activations(
  config: RunConfig, task: Task, model: ModelConfig, mesh: Mesh
) -> int | None:
  """Bytes of layer inputs that wait for the backward pass, on one device; None
  where there are no such layers, or the remat policy keeps more."""
  train = config.stage(task.name).train
  if train.remat != "full" or not task.reads_text:
    return None
  parts = train.accumulate_steps * sharding.num_shards(mesh)
  rows = train.global_batch_size // parts
  if task.name == "rl":
    rows *= config.rl.group_size
  width = model.llm.width * jnp.dtype(train.compute_dtype).itemsize
  return rows * config.data.sequence_length * width * model.llm.num_layers


def _times(
  found: list[hlo.Collective],
  config: RunConfig,
  task: Task,
  model: ModelConfig,
  topology: Topology,
  mesh: Mesh,
) -> dict[str, Any]:
  """FLOPs and, for a known chip, lower bounds of a step's time."""
  stage, data = config.stage(task.name), task.data(config.data)
  train = stage.train
  products = tuple(task.products(model, data, config))
  kinds = {"constant": task.constant, "adapters": config.adapters(task.name)}
  count = flops.train_step(products, stage, **kinds)
  result: dict[str, Any] = {
    "model_flops": count.model,
    "recomputed_flops": count.recomputed,
  }
  chip = topology.chip
  if chip is None:
    return result
  local = [c for c in found if not _crosses_slices(c, mesh)]
  remote = [c for c in found if _crosses_slices(c, mesh)]
  peak = chip.flops * topology.num_chips
  seconds = {
    "compute": count.total / peak,
    "hbm": flops.hbm_bytes(
      products,
      stage,
      parts=sharding.num_shards(mesh),
      fsdp=mesh.shape["fsdp"],
      **kinds,
    )
    / (chip.bandwidth / chip.devices),
    # A chip's links carry half of their rate in each direction.
    "links": sum(c.sent for c in local) / (chip.links / chip.devices / 2),
  }
  if remote and chip.dcn is not None:
    seconds["dcn"] = sum(c.sent for c in remote) / chip.dcn
  elif remote:
    result["note"] = f"no published DCN rate for {topology.name}: left out."
  work = max(seconds["compute"], seconds["hbm"])
  traffic = seconds["links"] + seconds.get("dcn", 0.0)
  result["seconds"] = seconds
  step = work + traffic
  tokens = train.global_batch_size * data.sequence_length
  result |= {
    "step_seconds": step,
    "mfu": count.model / peak / step,
    "mfu_overlapped": count.model / peak / max(work, traffic),
    "hours": step * train.steps / 3600,
    "chip_hours": step * train.steps / 3600 * topology.num_chips,
  }
  if tokens:
    result["tokens_per_second"] = tokens / step
  return result


def changes(config: RunConfig, what: str, mesh: Mesh) -> list[str]:
  """What to try when memory does not suffice, cheapest first."""
  if what == "generate":
    return [
      "a smaller eval.batch_size",
      f"a larger mesh.tensor or mesh.fsdp than {mesh.shape['tensor']} and "
      f"{mesh.shape['fsdp']}",
    ]
  train = config.stage(what).train
  rows = train.global_batch_size // sharding.num_shards(mesh)
  found = []
  if train.remat != "full":
    found.append(f"{what}.train.remat=full instead of {train.remat}")
  if rows > train.accumulate_steps:
    found.append(
      f"{what}.train.accumulate_steps={2 * train.accumulate_steps} (a device "
      f"works on {rows // train.accumulate_steps} rows at a time)"
    )
  if mesh.shape["data"] > 1:
    found.append("mesh.data=1 and mesh.fsdp=-1, so that no parameter is copied")
  if train.param_dtype == "float32":
    found.append(
      f"{what}.train.param_dtype=bfloat16 (half of the bytes of parameters; "
      "updates are rounded at random)"
    )
  found.append("more chips, over which fsdp splits the parameters")
  return found
