"""What a mask must take on chips that you don't have, by their compilers.

Layers repeat, so each stage is compiled with one layer and with two; what the
second adds is added for each further one.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from argenseg_jax import config_parsing, construct, sharding
from argenseg_jax.config import MeshConfig
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.planning import topology
from argenseg_jax.tools.bench.stages import Cost, Stage, stages


def forecast(
  config: ModelConfig, batch: int, dtype: str, name: str
) -> Iterator[tuple[Stage, Cost, float]]:
  """Yields each stage, what its compiled program computes and moves, and the
  seconds that the chip needs for that at its published rates.

  Args:
    config: of the model.
    batch: rows.
    dtype: of weights and computation.
    name: key of `chips.CHIPS`; its compiler is installed.
  """
  chip = topology.CHIPS[name]
  sides = tuple(map(int, chip.topology.partition(":")[2].split("x")))
  described = topology.devices(topology.Topology(name, sides, 1))
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), described[:1])
  with jax.set_mesh(mesh):
    pair = [_compiled(config, n, batch, dtype, mesh) for n in (1, 2)]
    whole = stages(config, batch, dtype)
    for stage, one, two in zip(whole, *pair, strict=True):
      more = _layers(config, stage) - 1
      cost = Cost(
        one.flops + more * (two.flops - one.flops),
        one.bytes + more * (two.bytes - one.bytes),
      )
      seconds = max(cost.flops / chip.flops, cost.bytes / chip.bandwidth)
      yield stage, cost, seconds * chip.devices


def _layers(config: ModelConfig, stage: Stage) -> int:
  if stage.name != "vision tower":
    return config.llm.num_layers
  vision = config.vision
  return vision.select_layer % (vision.num_layers + 1)  # Those that are read.


def _compiled(config, layers: int, batch: int, dtype: str, mesh):
  """What the compiler counts for each stage of a model of `layers` layers."""
  config = config_parsing.replace(
    config,
    {
      "llm.num_layers": layers,
      "vision.num_layers": min(layers, config.vision.num_layers),
      "vision.select_layer": -1,
    },
  )
  place = sharding.replicated(mesh)

  def make():
    model = ARGenSeg(
      config,
      rngs=construct.Rngs(0),
      dtype=jnp.dtype(dtype),
      param_dtype=jnp.dtype(dtype),
    )
    model.unstack()  # A loop's body would be counted once.
    return model

  graph, state = nnx.split(construct.abstract(make))

  def placed(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )

  for stage in stages(config, batch, dtype):

    def run(state, *inputs, function=stage.function):
      return function(nnx.merge(graph, state), *inputs)

    donated = (1,) if stage.cached else ()
    program = jax.jit(run, donate_argnums=donated)
    lowered = program.lower(placed(state), *placed(stage.inputs))
    counted = lowered.compile().cost_analysis()
    if counted is None:
      raise RuntimeError("this compiler does not count FLOPs and bytes.")
    yield Cost(counted.get("flops", 0.0), counted["bytes accessed"])
