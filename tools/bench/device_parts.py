"""The measurements of `argenseg bench device`, each part in its own process.

Programs of a part are compiled in threads beside each other, then timed one by
one.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import construct, variants
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models.int8 import Weights
from argenseg_jax.tools.bench.device_kernels import (
  attention,
  ceilings,
  correct,
  loss,
  prediction,
)
from argenseg_jax.tools.bench.device_timing import (
  REPEATS,
  Result,
  bound_ms,
  chip,
  compile_all,
  random,
  result,
  wait,
)
from argenseg_jax.tools.bench.timing import median_seconds, trace, traces_into


def main(argv: list[str]) -> int:
  """Prints the lines of part argv[0] at size argv[1]; traces go to argv[2],
  if there is one."""
  began = time.perf_counter()
  device = jax.devices()[0]
  tiny = argv[1] == "tiny" or (argv[1] == "auto" and device.platform == "cpu")
  about = {"device": device.device_kind, "jax": jax.__version__}
  with traces_into(argv[2] if len(argv) > 2 else None):
    for line in _PARTS[argv[0]](tiny):
      line["after_s"] = round(time.perf_counter() - began, 1)
      print(json.dumps({**line, **about}), flush=True)
  return 0


def filled(abstract: nnx.State) -> nnx.State:
  """Random numbers in place of shapes, from one array of them: a program that
  draws them all would take long to compile."""
  leaves, tree = jax.tree.flatten(abstract)
  largest = max(int(np.prod(x.shape)) for x in leaves)
  base = random((largest + 4096,), scale=1)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def cut(first, shape, dtype):
    x = jax.lax.dynamic_slice(base_of[0], (first,), (int(np.prod(shape)),))
    x = x.reshape(shape)
    if len(shape) < 2:
      x = 1 + 0.1 * x
    elif jnp.issubdtype(dtype, jnp.integer):
      x = 30 * x
    else:
      x = x * max(shape[-2], 1) ** -0.5
    return x.astype(dtype)

  base_of = [base]
  made = [cut(i % 4096, x.shape, x.dtype) for i, x in enumerate(leaves)]
  return jax.block_until_ready(tree.unflatten(made))


def mask(
  tiny: bool, *, weights: Weights | Literal[""] = "", batch: int = 1
) -> Iterator[Result]:
  """Image to mask, and what it consists of."""
  from argenseg_jax.tools.bench import mask_programs

  config = variants.get("tiny" if tiny else "argenseg_8b")

  def make():
    return mask_programs.model(config, jnp.bfloat16, weights)

  began = time.perf_counter()
  graph, state = nnx.split(construct.abstract(make))
  state = filled(state)
  seconds = time.perf_counter() - began
  yield result("weights made", seconds, "s")
  decoder_bytes = _bytes(nnx.state(nnx.merge(graph, state).llm.layers))
  inputs = mask_programs.inputs(config, batch)
  programs = {
    mask_programs.ONE_PASS: (
      mask_programs.of_state(graph, mask_programs.one_pass),
      (state, mask_programs.token_inputs(config, batch)),
    ),
    mask_programs.WHOLE: (
      mask_programs.of_state(graph, mask_programs.image_to_mask),
      (state, inputs.tokens, inputs.images),
    ),
    mask_programs.VISION: (
      mask_programs.of_state(graph, mask_programs.vision),
      (state, inputs.images),
    ),
  }
  bounds = mask_programs.bounds(config, batch, decoder_bytes)
  ready = []
  # Timed as they come, beside the compilation of others; then once more.
  for name, program, args, compiled_in in compile_all(programs):
    if isinstance(program, Exception):
      yield {"failed": name, "why": str(program).splitlines()[0][:300]}
      continue
    least = [bound_ms(*stage) for stage in bounds[name]]
    known = [x for x in least if x is not None]
    bound = sum(known) if len(known) == len(least) else None
    run = functools.partial(wait, program, args)
    run()
    ready.append((name, run, bound, compiled_in))
    if name == mask_programs.WHOLE:
      whole = functools.partial(
        mask_programs.with_host, program, args[0], inputs
      )
      whole()
      ready.append((f"{name}, host included", whole, bound, None))
    for name, run, bound, seconds in ready[-2:]:
      yield _timed(name, run, bound, seconds)
  for name, run, bound, seconds in ready:
    yield _timed(name, run, bound, seconds)


def _timed(name, run, bound, compiled_in) -> Result:
  milliseconds = 1e3 * median_seconds(run, REPEATS)
  trace(name, run)
  more = {} if compiled_in is None else {"compile_s": round(compiled_in, 1)}
  return result(name, milliseconds, "ms", bound=bound, **more)


def _bytes(state: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def train(tiny: bool, variant: str, batch: int) -> Iterator[Result]:
  """A whole step of `argenseg train` with codes that are known before."""
  from argenseg_jax.models import attention as attention_lib
  from argenseg_jax.tools.bench import train_programs

  config: ModelConfig = variants.get("tiny" if tiny else variant)
  on_gpu = jax.default_backend() == "gpu"
  forms = [("none", "auto", True), ("none", "auto", False)]
  if on_gpu:
    forms = [("none", "gpu", True), *forms, ("dots", "gpu", True)]
  library = attention_lib.MIN_LIBRARY_SCORES
  for remat, kind, by_library in forms[: 1 if tiny else None]:
    attention_lib.MIN_LIBRARY_SCORES = library if by_library else 1 << 60
    try:
      found = train_programs.step(
        config,
        2 if tiny else batch,
        remat=remat,
        implementation=kind,
        fill=filled,
      )
    except Exception as error:
      yield {"failed": f"{remat} {kind}", "why": str(error)[:300]}
      continue
    rates = chip()
    peak = rates.flops / rates.devices if rates else None
    yield result(
      f"training step, batch {found.rows}, remat {remat}, loss {kind}, "
      f"attention {'by library' if by_library else 'plain'}",
      1e3 * found.seconds,
      "ms",
      mfu=found.flops / found.seconds / peak if peak else None,
      trace_s=round(found.trace_seconds, 1),
      compile_s=round(found.compile_seconds, 1),
      temp_mib=found.temp_mib,
      loss=found.loss,
      tokens=found.tokens,
    )


def peer(tiny: bool) -> Iterator[Result]:
  from argenseg_jax.tools.bench import peer as peer_lib

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  config = variants.get("argenseg_8b")
  if tiny:
    config = variants.get("bench")
  dtype = "float32" if device == "cpu" else "bfloat16"
  for name, seconds in peer_lib.stages(config, 5, device=device, dtype=dtype):
    yield result(name, 1e3 * seconds, "ms")


_PARTS: dict[str, Callable[[bool], Iterable[Result]]] = {
  "ceilings": ceilings,
  "correct": correct,
  "mask": mask,
  "loss": loss,
  "attention": attention,
  "prediction": prediction,
  "train_1b": functools.partial(train, variant="argenseg_1b", batch=16),
  "train_2b": functools.partial(train, variant="argenseg_2b", batch=8),
  "mask_int8": functools.partial(mask, weights="int8"),
  "mask_fp8": functools.partial(mask, weights="float8_e4m3fn"),
  "mask_16": functools.partial(mask, batch=16),
  "peer": peer,
}


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
