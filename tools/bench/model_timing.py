"""How long programs of one model take."""

import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models.int8 import Weights
from argenseg_jax.tools.bench import mask_programs
from argenseg_jax.tools.bench.stages import Stage
from argenseg_jax.tools.bench.timing import Timed, median_seconds, trace


class Timer:
  """Times programs of one model with random weights.

  Args:
    config: of the model.
    dtype: of weights and computation.
    weights: int8 or float8_e4m3fn for the decoder's, "" for `dtype`.
    batch: said in each result.
    repeats: see `timing.median_seconds`.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    dtype: str,
    weights: Weights | Literal[""],
    batch: int,
    repeats: int,
  ):
    def make():
      return mask_programs.model(config, dtype, weights)

    self._graph = nnx.graphdef(construct.abstract(make))
    self._state = jax.jit(lambda: nnx.state(make()))()
    self._batch, self._repeats = batch, repeats

  def program(
    self,
    name: str,
    function: Callable,
    *inputs: Any,
    bound: float | None = None,
  ) -> tuple[Any, Timed]:
    """Times `function(model, *inputs)`; returns its result too."""
    program = self._compiled(function)

    def run():
      return jax.block_until_ready(program(self._state, *inputs))

    return self._timed(name, run, bound)

  def stage(self, stage: Stage, bound: float) -> Timed:
    """With made-up inputs; a cache goes round and round."""
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stage.inputs)
    if not stage.cached:
      return self.program(stage.name, stage.function, *made, bound=bound)[1]
    program = self._compiled(stage.function, donate_argnums=1)
    cache, *rest = made

    def run():
      nonlocal cache
      out, cache = program(self._state, cache, *rest)
      jax.block_until_ready((out, cache))

    return self._timed(stage.name, run, bound)[1]

  def _compiled(self, function: Callable, **options: Any) -> Callable:
    return jax.jit(mask_programs.of_state(self._graph, function), **options)

  def _timed(
    self, name: str, run: Callable[[], Any], bound: float | None
  ) -> tuple[Any, Timed]:
    began = time.perf_counter()
    result = run()
    first = time.perf_counter() - began
    seconds = median_seconds(run, self._repeats)
    trace(f"{name}, batch {self._batch}", run)
    return result, Timed(name, self._batch, seconds, first - seconds, bound)
