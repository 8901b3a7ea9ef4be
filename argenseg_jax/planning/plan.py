"""What a run needs and costs on hardware that you don't have.

The real training step (or the generation program) is compiled ahead of time for
a described topology; memory and collectives are the compiler's own. Times are
bounds from published figures (`kernels/chips.py`), not forecasts: nothing runs
at its peak.
"""

from typing import Any

from jax.sharding import Mesh

from argenseg_jax import sharding
from argenseg_jax.config import RunConfig
from argenseg_jax.kernels import chips
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.planning import calibration, counted, hlo
from argenseg_jax.planning.programs import Program
from argenseg_jax.planning.topology import Topology
from argenseg_jax.training import initialize
from argenseg_jax.training.tasks import TASKS, Task

# Elements. XLA for TPUs reduces smaller arrays whole on purpose: one phase is
# faster than two. On v5e:2x4 64 x 64 is all-reduced, 128 x 128 is not.
_SMALLEST_SCATTER = 128 * 128


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
    kept = counted.kept_activations(config, task, model, topology, mesh)
    result["bytes"] |= {f"temporary: {k}": size for k, size in kept.items()}
  result["peak"] = _peak(memory)
  if chip:
    result["fits"] = result["peak"] <= result["hbm"]
    if not result["fits"]:
      result["change"] = changes(config, what, mesh)
  found = hlo.collectives(text)
  result["collectives"] = _summary(found, mesh)
  whole = hlo.reduced_whole(
    found,
    program.split_shapes,
    parts=mesh.shape["fsdp"],
    smallest=_SMALLEST_SCATTER if topology.name in chips.TPUS else 0,
  )
  result["whole_gradients_all_reduced"] = [list(shape) for shape in whole]
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


def _times(
  found: list[hlo.Collective],
  config: RunConfig,
  task: Task,
  model: ModelConfig,
  topology: Topology,
  mesh: Mesh,
) -> dict[str, Any]:
  """FLOPs and, for a known chip, lower bounds of a step's time, beside what it
  would take at the shares of them that were measured."""
  train = config.stage(task.name).train
  work = counted.work_of(config, task, model, topology, mesh)
  result: dict[str, Any] = {
    "model_flops": work.step.model,
    "recomputed_flops": work.step.recomputed,
  }
  chip = topology.chip
  if chip is None:
    return result
  local = [c for c in found if not _crosses_slices(c, mesh)]
  remote = [c for c in found if _crosses_slices(c, mesh)]
  seconds = {
    **work.seconds,
    # A chip's links carry half of their rate in each direction.
    "links": sum(c.sent for c in local) / (chip.links / chip.devices / 2),
  }
  if remote and chip.dcn is not None:
    seconds["dcn"] = sum(c.sent for c in remote) / chip.dcn
  elif remote:
    result["note"] = f"no published DCN rate for {topology.name}: left out."
  busy = max(work.seconds.values())
  traffic = seconds["links"] + seconds.get("dcn", 0.0)
  result["seconds"] = seconds
  step = busy + traffic
  ideal = work.step.model / (chip.flops * topology.num_chips)
  tokens = train.global_batch_size * task.data(config.data).sequence_length
  result |= {
    "step_seconds": step,
    "mfu": ideal / step,
    "mfu_overlapped": ideal / max(busy, traffic),
    "hours": step * train.steps / 3600,
    "chip_hours": step * train.steps / 3600 * topology.num_chips,
  }
  if tokens:
    result["tokens_per_second"] = tokens / step
  slow, fast = (
    calibration.step_seconds(work, train, chip, topology.num_chips, shares)
    + traffic
    for shares in calibration.H100
  )
  result["at_measured_shares"] = {
    "step_seconds": [fast, slow],
    "mfu": [ideal / slow, ideal / fast],
  }
  if published := calibration.PUBLISHED_MFU.get(topology.name):
    result["published_mfu"] = list(published)
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
