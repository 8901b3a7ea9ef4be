"""The measurements of `argenseg bench device`, each part in its own process.

Programs of a part are compiled in threads beside each other, then timed one by
one.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import variants
from argenseg_jax.kernels.chips import CHIPS, Chip, name_of
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.tools.bench.timing import median_seconds

Result = dict[str, Any]
_REPEATS = 20


def main(argv: list[str]) -> int:
  """Prints the lines of part argv[0] at size argv[1]."""
  began = time.perf_counter()
  device = jax.devices()[0]
  tiny = argv[1] == "tiny" or (argv[1] == "auto" and device.platform == "cpu")
  about = {"device": device.device_kind, "jax": jax.__version__}
  for result in _PARTS[argv[0]](tiny):
    result["after_s"] = round(time.perf_counter() - began, 1)
    print(json.dumps({**result, **about}), flush=True)
  return 0


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
    run = functools.partial(_wait, program, inputs)
    run()
    found = 1e3 * median_seconds(run, _REPEATS) / times
    memory = program.memory_analysis()
    temp = memory.temp_size_in_bytes / 2**20 if memory else None
    more = {"compile_s": round(seconds, 1), "temp_mib": temp}
    yield result(name, found, "ms", bound=bound, **more)


def _wait(program: Callable, inputs: tuple) -> Any:
  return jax.block_until_ready(program(*inputs))


def ceilings(tiny: bool) -> Iterator[Result]:
  side, size = (512, 2**20) if tiny else (8192, 2**30)
  a, b = random((side, side)), random((side, side + 64))[:, :side]
  product = jax.jit(jnp.matmul)
  run = functools.partial(_wait, product, (a, b))
  run()
  rates = chip()
  yield result(
    f"product of {side}",
    2e-12 * side**3 / median_seconds(run, _REPEATS),
    "TFLOP/s",
    published=rates and rates.flops / 1e12,
  )
  x = random((size,))
  copy = functools.partial(_wait, jax.jit(lambda x: -x), (x,))
  copy()
  yield result(
    f"copy of {size} bfloat16",
    4e-9 * size / median_seconds(copy, _REPEATS),
    "GB/s",
    published=rates and rates.bandwidth / 1e9,
  )


def correct(tiny: bool) -> Iterator[Result]:
  """Relative errors, on fresh random numbers, against the references."""
  from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
  from argenseg_jax.kernels.nearest_code import nearest_code
  from argenseg_jax.kernels.scale_prediction import scale_prediction

  kernels = ["xla"] if tiny else ["xla", "gpu"]
  if jax.default_backend() == "tpu":
    kernels = ["xla", "tpu"]
  for t, d, vocab in (
    ((150, 320, 300),)
    if tiny
    else (
      (150, 320, 300),
      (2048, 4096, 9665),
    )
  ):
    hidden, head = random((t, d), scale=1), random((vocab, d), scale=d**-0.5)
    targets = jax.random.randint(jax.random.key(1), (t,), 0, vocab)
    weights = jax.random.uniform(jax.random.key(2), (t,))

    def loss(hidden, head, weights, kind, targets=targets):
      losses = linear_cross_entropy(
        hidden, head, targets, weights, z_loss=1e-3, implementation=kind
      )
      return jnp.sum(losses)

    def both(kind, hidden=hidden, head=head, weights=weights, loss=loss):
      grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
      return jax.jit(grad, static_argnums=3)(hidden, head, weights, kind)

    expected = both("reference")
    for kind in kernels:
      yield from _error(
        f"loss {kind} {t} x {vocab} x {d}", both, kind, expected
      )
  hidden, head = random((1, 300, 256), scale=1), random((4096, 256))
  codebook = random((4096, 32), "float32", 1)

  def predict(kind):
    found = scale_prediction(hidden, head, codebook, implementation=kind)
    return found[0].astype(jnp.float32)

  def nearest(kind):
    latent = random((1000, 32), "float32", 1)
    found = nearest_code(latent, codebook, implementation=kind)
    return found.astype(jnp.float32)

  for kind in kernels:
    yield from _error(f"prediction {kind}", predict, kind, predict("reference"))
    yield from _error(f"nearest {kind}", nearest, kind, nearest("reference"))


def _error(name, function, kind, expected) -> Iterator[Result]:
  try:
    found = function(kind)
  except Exception as error:
    yield {"failed": name, "why": str(error).splitlines()[0][:300]}
    return
  errors = jax.tree.map(
    lambda a, b: float(
      jnp.linalg.norm((a - b).astype(jnp.float32).ravel())
      / jnp.linalg.norm(b.astype(jnp.float32).ravel())
    ),
    found,
    expected,
  )
  yield result(f"error of {name}", max(jax.tree.leaves(errors)), "relative")


def loss(tiny: bool) -> Iterator[Result]:
  from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy

  shapes = (
    ((64, 64, 300),)
    if tiny
    else (
      (8192, 4096, 96_653),
      (16_384, 896, 151_674),
    )
  )
  kinds = ["xla", "reference"] if tiny else ["gpu", "xla", "reference"]
  for t, d, words in shapes:
    targets = jax.random.randint(jax.random.key(1), (t,), 0, words)
    inputs = random((t, d), scale=1), random((words, d), scale=d**-0.5)
    inputs = *inputs, targets, jnp.ones(t)
    programs = {}
    for kind in kinds:

      def total(hidden, head, targets, weights, kind=kind):
        losses = linear_cross_entropy(
          hidden, head, targets, weights, implementation=kind
        )
        return jnp.sum(losses)

      grad = jax.value_and_grad(total, argnums=(0, 1))
      name = f"loss and gradients, {t} x {words} x {d}, {kind}"
      programs[name] = grad, inputs
    yield from time_all(programs, bound=bound_ms(6 * t * d * words, 0))


def prediction(tiny: bool) -> Iterator[Result]:
  """Many predictions in one program: a call costs more than the work."""
  from argenseg_jax.kernels.scale_prediction import scale_prediction

  kinds = ["xla", "reference"] if tiny else ["gpu", "xla", "reference"]
  times = 4 if tiny else 64
  for rows in (64,) if tiny else (1, 64, 256, 4096):
    d, codes = (64, 128) if tiny else (4096, 4096)
    inputs = random((1, rows, d), scale=1), random((codes, d))
    inputs = *inputs, random((codes, 32), "float32", 1)
    programs = {}
    for kind in kinds:

      def many(hidden, head, codebook, kind=kind, times=times):
        def one(hidden, _):
          found, _ = scale_prediction(
            hidden, head, codebook, implementation=kind
          )
          # The next turn depends on this one.
          hidden = hidden + (found[..., None] < 0).astype(hidden.dtype)
          return hidden, found[0, 0]

        return jax.lax.scan(one, hidden, length=times)

      programs[f"prediction, {rows} rows, {kind}"] = many, inputs
    bound = bound_ms(2 * rows * d * codes, 2 * (rows + codes) * d)
    yield from time_all(programs, bound=bound, times=times)


def attention(tiny: bool) -> Iterator[Result]:
  """Value and gradient, by the library and plain."""
  shapes = {
    "causal, 8B": (4, 2048, 32, 8, 128),
    "causal, 1B": (16, 1024, 14, 2, 64),
    "full, vision tower": (16, 1025, 16, 16, 64),
  }
  if tiny:
    shapes = {"causal, tiny": (1, 64, 2, 1, 32)}
  for what, shape in shapes.items():
    yield from _attention(what, *shape)


def _attention(what, b, t, heads, kv, hd) -> Iterator[Result]:
  from argenseg_jax.models import attention as attention_lib

  causal = what.startswith("causal")
  inputs = tuple(
    random((b, t, n, hd), scale=1) * (1 + i)
    for i, n in enumerate((heads, kv, kv))
  )
  segments = jnp.ones((b, t), jnp.int32)
  reach = jnp.broadcast_to(jnp.arange(t), (b, t))
  visible = attention_lib.Visible(reach, segments, segments)

  def plain(q, k, v):
    mask = attention_lib.attention_mask(*visible) if causal else None
    return attention_lib.attend(q, k, v, mask)

  def library(q, k, v):
    return attention_lib.attend_by_library(q, k, v, visible if causal else None)

  def cudnn(q, k, v):
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=causal, implementation="cudnn"
    )

  def gradient(function):
    def total(q, k, v):
      out = function(q, k, v).astype(jnp.float32)
      return jnp.sum(
        out * jnp.cos(jnp.arange(t, dtype=out.dtype))[:, None, None]
      )

    return jax.value_and_grad(total, argnums=(0, 1, 2))

  forms = {"plain": plain}
  if jax.default_backend() == "gpu":
    forms["by library"] = library
    if not t % 2:
      forms["cudnn"] = cudnn
  scores = 4 * b * t * t * heads * hd / (2 if causal else 1)
  yield from time_all(
    {f"{what}, value, {n}": (f, inputs) for n, f in forms.items()},
    bound=bound_ms(scores, 0),
  )
  grads = {n: gradient(f) for n, f in forms.items()}
  yield from time_all(
    {f"{what}, gradient, {n}": (f, inputs) for n, f in grads.items()},
    bound=bound_ms(3.5 * scores, 0),
  )
  expected = jax.jit(grads["plain"])(*inputs)[1]
  for name in forms:
    yield from _error(
      f"gradient of {what}, {name}",
      lambda name: jax.jit(grads[name])(*inputs)[1],
      name,
      expected,
    )


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


def mask(tiny: bool, *, weights: str = "", batch: int = 1) -> Iterator[Result]:
  """Image to mask, and what it consists of."""
  from argenseg_jax.models import int8
  from argenseg_jax.models.argenseg import ARGenSeg
  from argenseg_jax.tools.bench import mask_programs

  config = variants.get("tiny" if tiny else "argenseg_8b")

  def make():
    model = ARGenSeg(
      config,
      rngs=nnx.Rngs(0),
      dtype=jnp.bfloat16,
      param_dtype=jnp.bfloat16,
    )
    if weights:
      int8.quantize(model.llm, weights)
    model.prepare_to_generate()
    return model

  began = time.perf_counter()
  graph, state = nnx.split(nnx.eval_shape(make))
  state = filled(state)
  seconds = time.perf_counter() - began
  yield result("weights made", seconds, "s")
  decoder_bytes = _bytes(nnx.state(nnx.merge(graph, state).llm.layers))
  inputs = mask_programs.inputs(config, batch)
  programs = {
    mask_programs.ONE_PASS: (
      functools.partial(mask_programs.one_pass, graph),
      (state, mask_programs.token_inputs(config, batch)),
    ),
    mask_programs.WHOLE: (
      functools.partial(mask_programs.image_to_mask, graph),
      (state, inputs.tokens, inputs.images),
    ),
    mask_programs.VISION: (
      functools.partial(mask_programs.vision, graph),
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
    bound = None if None in least else sum(least)
    run = functools.partial(_wait, program, args)
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
  milliseconds = 1e3 * median_seconds(run, _REPEATS)
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
