"""`argenseg bench generate`: what a mask costs, stage by stage."""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

EXAMPLE = """\
examples:
  argenseg bench generate                        the size "bench"
  argenseg bench generate --batches=1,16 --peer  beside a PyTorch loop
  argenseg bench generate --variant=argenseg_8b --dtype=bfloat16

Weights and pictures are random; `<ge_start>` is forced, so that every row has
one mask. --peer needs torch and transformers: pip install "torch==2.13.0"
transformers. It takes as many threads as this process may use cores. Seconds
are medians over --repeats (fewer where a stage is long); all rows of a table
come from one run.
"""

_PROMPT_TEXT = 40  # Text tokens around the picture.
_AHEAD = 5  # Of them, before the picture.
_ENOUGH = 30.0  # Seconds after which a stage is not repeated again.


class Timed(NamedTuple):
  """A stage and how long it took."""

  name: str
  batch: int
  seconds: float
  compile_seconds: float


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg bench generate",
    description="What a mask costs, stage by stage.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--variant", default="bench", help="named model size")
  parser.add_argument(
    "--dtype", default="float32", choices=("float32", "bfloat16")
  )
  parser.add_argument(
    "--weights",
    default="",
    choices=("", "int8", "float8_e4m3fn"),
    help="round the decoder's weights to eight bits first",
  )
  parser.add_argument("--batches", default="1", help="comma-separated")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument(
    "--peer", action="store_true", help="also time a PyTorch loop at batch 1"
  )
  args = parser.parse_args(argv)
  batches = args.batches.split(",")
  if not all(b.isdecimal() and int(b) for b in batches) or args.repeats < 1:
    parser.error("--batches and --repeats must be positive whole numbers")
  import jax

  from argenseg_jax.models import variants

  config = variants.get(args.variant)
  print(
    f"{config.name}, {args.weights or args.dtype}, "
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n"
  )
  print("| stage | batch | s | s a mask | compiled in s |")
  print("|---|---:|---:|---:|---:|")
  found = []
  for batch in map(int, batches):
    for timed in _ours(config, args, batch):
      found.append(timed)
      print(
        f"| {timed.name} | {batch} | {timed.seconds:.3f} | "
        f"{timed.seconds / batch:.3f} | {timed.compile_seconds:.1f} |",
        flush=True,
      )
  if args.peer:
    from argenseg_jax.tools import bench_peer

    for name, seconds in bench_peer.stages(config, args.repeats):
      found.append(Timed(name, 1, seconds, 0.0))
      print(f"| {name} | 1 | {seconds:.3f} | {seconds:.3f} | |", flush=True)
  print()
  for line in _ratios(found):
    print(line)
  return 0


def _ours(config, args: argparse.Namespace, batch: int):
  """Yields `Timed` of each stage, then of whole programs."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from argenseg_jax.kernels import dispatch
  from argenseg_jax.kernels.scale_prediction import scale_prediction
  from argenseg_jax.models import quantized
  from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
  from argenseg_jax.models.llm import KVCache
  from argenseg_jax.sampling import generate, prefill_prefix

  def make():
    model = ARGenSeg(
      config,
      rngs=nnx.Rngs(0),
      dtype=jnp.dtype(args.dtype),
      param_dtype=jnp.dtype(args.dtype),
    )
    if args.weights:
      quantized.quantize(model.llm, args.weights)
    if dispatch.target().platform == "cpu":
      model.unstack()
    return model

  graph = nnx.graphdef(nnx.eval_shape(make))
  state = jax.jit(lambda: nnx.state(make()))()
  ids, n = config.token_ids, sum(s * s for s in config.vqvae.scales)
  seen = config.vision.num_embeddings
  rng = np.random.default_rng(0)
  prompt = rng.integers(10, 11 + ids.first_code // 4, seen + _PROMPT_TEXT)
  prompt[_AHEAD : _AHEAD + seen] = ids.img_context
  tokens = jnp.asarray(np.tile(prompt, (batch, 1)), jnp.int32)
  side = config.vision.image_side
  images = jnp.asarray(
    rng.integers(0, 256, (batch, 1, side, side, 3)), jnp.uint8
  )
  options = dict(max_text=8, start_with_mask=True, stop_after_masks=True)

  def bound(function):
    return jax.jit(lambda state, *xs: function(nnx.merge(graph, state), *xs))

  def vision(model, images):
    return model.vision_embeddings(normalize_images(images))

  def prefill(model, tokens, vision):
    cache = KVCache.empty(config.llm, *tokens.shape, model.llm.dtype)
    hidden, _ = model.llm.extend(
      model.prompt_embeddings(tokens, vision),
      cache,
      positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
      valid=jnp.ones_like(tokens, bool),
    )
    return hidden

  def codes(model, tokens, vision):
    valid = jnp.ones_like(tokens, bool)
    return generate(
      model, tokens=tokens, valid=valid, vision=vision, collect=True, **options
    )

  def decode(model, codes):
    return model.vqvae.decode(codes)

  def token_by_token(model, tokens, vision, inputs):
    """The same codes, one pass each, after the same prefill."""
    b, t = tokens.shape
    _, cache = model.llm.extend(
      model.prompt_embeddings(tokens, vision),
      KVCache.empty(config.llm, b, t + n, model.llm.dtype),
      positions=jnp.broadcast_to(jnp.arange(t), (b, t)),
      valid=jnp.ones((b, t), bool),
      visible_slots=t,
    )

    def step(cache, x):
      hidden, cache = model.llm.extend(
        x[:, None],
        cache,
        positions=jnp.full((b, 1), cache.length),
        valid=jnp.ones((b, 1), bool),
      )
      code, _ = scale_prediction(
        hidden,
        model.code_head.astype(hidden.dtype),
        model.vqvae.quantizer.codebook[...],
      )
      return cache, code[:, 0]

    return jax.lax.scan(step, cache, jnp.moveaxis(inputs, 1, 0))[1]

  def picture_to_mask(model, tokens, images):
    generated = codes(model, tokens, vision(model, images))
    return model.vqvae.decode(generated.codes[:, 0])

  def requests_of_a_picture(model, tokens, images):
    """All rows ask about one picture."""
    start = _AHEAD + seen
    embeddings = vision(model, images[:1])
    prefix = prefill_prefix(model, tokens[:1, :start], embeddings)
    generated = generate(
      model,
      tokens=tokens[:, start:],
      valid=jnp.ones_like(tokens[:, start:], bool),
      vision=None,
      prefix=prefix,
      **options,
    )
    return model.vqvae.decode(generated.codes[:, 0])

  def timed(name, function, *inputs):
    program = bound(function)
    began = time.perf_counter()
    result = jax.block_until_ready(program(state, *inputs))
    first = time.perf_counter() - began
    seconds = median_seconds(
      lambda: jax.block_until_ready(program(state, *inputs)), args.repeats
    )
    return result, Timed(name, batch, seconds, first - seconds)

  embeddings, line = timed("vision tower", vision, images)
  yield line
  yield timed("prefill", prefill, tokens, embeddings)[1]
  generated, line = timed(CODES, codes, tokens, embeddings)
  yield line
  yield timed("VQ decode", decode, generated.codes[:, 0])[1]
  inputs = generated.inputs[:, 0]
  yield timed(ONE_BY_ONE, token_by_token, tokens, embeddings, inputs)[1]
  yield timed(WHOLE, picture_to_mask, tokens, images)[1]
  if batch > 1 and not config.bidirectional_prompt:
    yield timed(SHARED, requests_of_a_picture, tokens, images)[1]


CODES = "prefill and codes, scale by scale"
ONE_BY_ONE = "prefill and codes, token by token"
WHOLE = "picture to mask"
SHARED = "requests of one picture to masks"


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
  """Median wall seconds of a call, of fewer calls if they are long."""
  seconds: list[float] = []
  while len(seconds) < repeats and sum(seconds) < _ENOUGH:
    began = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - began)
  return sorted(seconds)[len(seconds) // 2]


def _ratios(found: list[Timed]) -> list[str]:
  by = {(t.name, t.batch): t.seconds for t in found}
  lines = []
  for batch in sorted({t.batch for t in found}):
    ratio = by[ONE_BY_ONE, batch] / by[CODES, batch]
    lines.append(
      f"scale by scale is {ratio:.1f} times as fast as token by token at batch "
      f"{batch}, prefill included"
    )
    for name in (WHOLE, SHARED):
      if batch > 1 and (name, batch) in by and (WHOLE, 1) in by:
        ratio = by[WHOLE, 1] / (by[name, batch] / batch)
        lines.append(f"{name}, batch {batch}: {ratio:.2f} times batch 1 a mask")
  for t in found:
    if t.name.startswith("peer: picture to mask") and (WHOLE, 1) in by:
      lines.append(f"{WHOLE}: {t.seconds / by[WHOLE, 1]:.2f} times {t.name}")
  return lines
