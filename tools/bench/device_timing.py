"""Timing programs on this device, and the bounds that its rates set."""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from argenseg_jax.kernels.chips import CHIPS, Chip, name_of
from argenseg_jax.tools.bench.timing import median_seconds, trace

Result = dict[str, Any]
REPEATS = 20


def chip() -> Chip | None:
  """Published rates of the device; None where they are not known."""
  return CHIPS.get(name_of(jax.devices()[0].device_kind) or "")


def result(name: str, value: float, unit: str, **more: Any) -> Result:
  return {"name": name, "value": value, "unit": unit, **more}


def bound_ms(flops: float, moved: float) -> float | None:
  """Milliseconds of the larger of both at the published rates."""
  rates = chip()
  if rates is None:
    return None
  return 1e3 * max(flops / rates.flops, moved / rates.bandwidth) * rates.devices


def random(shape: tuple[int, ...], dtype="bfloat16", scale=0.05) -> jax.Array:
  """Normal numbers; timings of zeros flatter."""
  key = jax.random.key(len(shape) + sum(shape))
  make = functools.partial(jax.random.normal, shape=shape, dtype=jnp.float32)
  return jax.jit(lambda key: (scale * make(key)).astype(dtype))(key)


def compile_all(
  programs: dict[str, tuple[Callable, tuple]], **options: Any
) -> Iterator[tuple[str, Any, tuple, float]]:
  """Yields name, compiled program, inputs and seconds; an exception stands for
  a program that does not compile."""

  def compile_one(lowered):
    began = time.perf_counter()
    try:
      return lowered.compile(), time.perf_counter() - began
    except Exception as error:  # One program that fails ends no table.
      return error, time.perf_counter() - began

  with ThreadPoolExecutor(8) as pool:
    waiting = {}
    for name, (function, inputs) in programs.items():
      try:
        began = time.perf_counter()
        lowered = jax.jit(function, **options).lower(*inputs)
        traced = time.perf_counter() - began
      except Exception as error:
        print(f"{name}: {error}", file=sys.stderr)
        yield name, error, inputs, 0.0
        continue
      waiting[name] = pool.submit(compile_one, lowered), inputs, traced
    for name, (future, inputs, traced) in waiting.items():
      compiled, seconds = future.result()
      yield name, compiled, inputs, traced + seconds


def time_all(
  programs: dict[str, tuple[Callable, tuple]],
  *,
  bound: float | None = None,
  times: int = 1,
) -> Iterator[Result]:
  """Milliseconds of each; `times`: of one turn of the loop inside."""
  for name, program, inputs, seconds in list(compile_all(programs)):
    if isinstance(program, Exception):
      yield {"failed": name, "why": str(program).splitlines()[0][:300]}
      continue
    run = functools.partial(wait, program, inputs)
    run()
    found = 1e3 * median_seconds(run, REPEATS) / times
    trace(name, run)
    memory = program.memory_analysis()
    temp = memory.temp_size_in_bytes / 2**20 if memory else None
    more = {"compile_s": round(seconds, 1), "temp_mib": temp}
    yield result(name, found, "ms", bound=bound, **more)


def wait(program: Callable, inputs: tuple) -> Any:
  return jax.block_until_ready(program(*inputs))
