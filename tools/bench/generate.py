"""`argenseg bench generate`: what a mask costs, stage by stage."""

import argparse
import functools
import time

from argenseg_jax.tools.bench import timing
from argenseg_jax.tools.bench.timing import Timed, median_seconds

EXAMPLE = """\
examples:
  argenseg bench generate                        the size "bench"
  argenseg bench generate --batches=1,16 --peer  beside a PyTorch loop
  argenseg bench generate --variant=argenseg_8b --dtype=bfloat16
  argenseg bench generate --chips=v5e,v5p,v6e --variant=argenseg_8b \\
    --dtype=bfloat16                             forecast, nothing is timed

Weights and images are random; `<ge_start>` is forced, so that every row has
one mask. --peer needs torch and transformers: pip install "torch==2.13.0"
transformers. It takes as many threads as this process may use cores. Seconds
are medians over --repeats (fewer where a stage is long); all rows of a table
come from one run. Token by token of many codes at batches above 1 runs one in
eight (each costs the same) and adds the others.

"bound" is the time that the counted FLOPs or bytes of a stage take at the
device's rates: published ones of an accelerator, for a CPU those of a large
product and a large copy, measured first. --chips compiles each stage with the
chip's own compiler (TPUs: pip install "jax[tpu]") and prints what that counts:
"ms" follows from it and is too long, since a TPU's compiler counts copies from
memory to memory as well; "counted ms" is the bound.
"""

_SIZE = (480, 640)  # Of the image that a mask is resized to.


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
  parser.add_argument("--chips", default="", help="forecast for these instead")
  timing.add_profile_option(parser)
  args = parser.parse_args(argv)
  batches = args.batches.split(",")
  if not all(b.isdecimal() and int(b) for b in batches) or args.repeats < 1:
    parser.error("--batches and --repeats must be positive whole numbers")
  if args.chips and args.profile:
    parser.error("--profile needs programs that run; --chips only compiles")
  from argenseg_jax import variants

  config = variants.get(args.variant)
  if args.chips:
    _forecast(config, args.dtype, list(map(int, batches)), args.chips)
    return 0
  import jax

  print(
    f"{config.name}, {args.weights or args.dtype}, "
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
  )
  rates = _rates(args.dtype)
  print(f"{rates.flops / 1e9:.0f} GFLOP/s, {rates.bytes / 1e9:.1f} GB/s\n")
  print("| stage | batch | s | s a mask | masks/s | bound s | compiled in s |")
  print("|---|---:|---:|---:|---:|---:|---:|")
  found = []
  with timing.traces_into(args.profile):
    for batch in map(int, batches):
      for timed in _ours(config, args, batch, rates):
        found.append(timed)
        bound = "" if timed.bound is None else f"{timed.bound:.4f}"
        print(
          f"| {timed.name} | {batch} | {timed.seconds:.4f} | "
          f"{timed.seconds / batch:.4f} | {batch / timed.seconds:.2f} | "
          f"{bound} | {timed.compile_seconds:.1f} |",
          flush=True,
        )
  if args.peer:
    from argenseg_jax.tools.bench import peer

    for name, seconds in peer.stages(config, args.repeats):
      found.append(Timed(name, 1, seconds, 0.0))
      print(
        f"| {name} | 1 | {seconds:.4f} | {seconds:.4f} | {1 / seconds:.2f} "
        "| | |",
        flush=True,
      )
  print()
  for line in _ratios(found):
    print(line)
  return 0


def _rates(dtype: str):
  """FLOP/s and bytes/s of the device, as a `Cost`."""
  import jax
  import jax.numpy as jnp

  from argenseg_jax.kernels.chips import CHIPS, name_of
  from argenseg_jax.tools.bench.stages import Cost

  device = jax.devices()[0]
  chip = CHIPS.get(name_of(device.device_kind) or "")
  if chip is not None and dtype == "bfloat16":
    return Cost(chip.flops / chip.devices, chip.bandwidth / chip.devices)
  side, size = (2048, 2**26) if device.platform == "cpu" else (8192, 2**30)
  a = jnp.ones((side, side), jnp.dtype(dtype))
  x = jnp.ones((size,), jnp.float32)
  product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)

  def best(run):
    seconds = []
    for _ in range(4):
      began = time.perf_counter()
      jax.block_until_ready(run())
      seconds.append(time.perf_counter() - began)
    return min(seconds)

  return Cost(
    2 * side**3 / best(lambda: product(a, a)),
    2 * 4 * size / best(lambda: copy(x)),
  )


def _bound(cost, rates) -> float:
  return max(cost.flops / rates.flops, cost.bytes / rates.bytes)


def _forecast(config, dtype: str, batches: list[int], chips: str) -> None:
  from argenseg_jax.config import ConfigError
  from argenseg_jax.planning import topology

  names = chips.split(",")
  for name in names:
    if name not in topology.CHIPS or topology.CHIPS[name].platform != "tpu":
      known = [n for n, c in topology.CHIPS.items() if c.platform == "tpu"]
      raise ConfigError(f"--chips={name}: give some of {', '.join(known)}.")
    topology.prepare(topology.Topology(name, (1,), 1))
  from argenseg_jax.tools.bench.forecast import forecast

  print(f"{config.name}, {dtype}, compiled for one chip, nothing ran\n")
  print("| chip | stage | batch | GFLOP | GB | ms | counted ms |")
  print("|---|---|---:|---:|---:|---:|---:|")
  for name in names:
    chip = topology.CHIPS[name]
    for batch in batches:
      total = counted = 0.0
      for stage, cost, seconds in forecast(config, batch, dtype, name):
        least = max(
          stage.cost.flops / chip.flops, stage.cost.bytes / chip.bandwidth
        )
        least *= chip.devices
        if stage.name != "text, a word":
          total, counted = total + seconds, counted + least
        print(
          f"| {name} | {stage.name} | {batch} | {cost.flops / 1e9:.1f} | "
          f"{cost.bytes / 1e9:.3f} | {seconds * 1e3:.2f} | "
          f"{least * 1e3:.2f} |",
          flush=True,
        )
      print(
        f"| {name} | all but words: {batch / total:.1f} masks/s | {batch} | | "
        f"| {total * 1e3:.2f} | {counted * 1e3:.2f} |",
        flush=True,
      )


def _ours(config, args: argparse.Namespace, batch: int, rates):
  """Yields `Timed` of each stage, then of whole programs."""
  import jax.numpy as jnp
  import numpy as np

  from argenseg_jax.inference.segment import seg_mask_at_size
  from argenseg_jax.tools.bench import mask_programs, model_timing
  from argenseg_jax.tools.bench import stages as bench_stages

  timer = model_timing.Timer(
    config,
    dtype=args.dtype,
    weights=args.weights,
    batch=batch,
    repeats=args.repeats,
  )
  inputs = mask_programs.inputs(config, batch)
  stages = list(bench_stages.stages(config, batch, args.dtype))
  for stage in stages:
    yield timer.stage(stage, _bound(stage.cost, rates))
  side = config.vqvae.image_side
  decoded = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)

  def post():
    for _ in range(batch):
      seg_mask_at_size(decoded, _SIZE)

  yield Timed(POST, batch, median_seconds(post, args.repeats), 0.0)
  parts = [s for s in stages if s.name != "text, a word"]
  between = sum((s.cost for s in parts[1:-1]), bench_stages.Cost(0.0, 0.0))
  everything = parts[0].cost + between + parts[-1].cost
  vision = jnp.zeros(
    (batch, config.vision.num_embeddings, config.llm.width),
    jnp.dtype(args.dtype),
  )
  prompt = (inputs.tokens, vision)
  collected = functools.partial(mask_programs.codes, collect=True)
  generated, line = timer.program(
    CODES, collected, *prompt, bound=_bound(between, rates)
  )
  yield line
  yield _one_by_one(timer, prompt, generated.inputs[:, 0])
  asked = (inputs.tokens, inputs.images)
  bound = _bound(everything, rates)
  yield timer.program(WHOLE, mask_programs.image_to_mask, *asked, bound=bound)[
    1
  ]
  if batch > 1 and not config.bidirectional_prompt:
    shared = mask_programs.requests_of_an_image(
      bench_stages.AHEAD + config.vision.num_embeddings
    )
    yield timer.program(SHARED, shared, *asked)[1]


def _one_by_one(timer, prompt: tuple, inputs) -> Timed:
  from argenseg_jax.tools.bench.mask_programs import codes_one_by_one

  def timed(inputs):
    return timer.program(ONE_BY_ONE, codes_one_by_one, *prompt, inputs)[1]

  b, n = inputs.shape[:2]
  if b == 1 or n < 512:  # Quick, or too short to tell apart.
    return timed(inputs)
  few, half = n // 8, n // 16
  long, short = timed(inputs[:, :few]), timed(inputs[:, :half])
  a_code = (long.seconds - short.seconds) / (few - half)
  return long._replace(seconds=long.seconds + (n - few) * a_code)


CODES = "prefill and codes, scale by scale"
ONE_BY_ONE = "prefill and codes, token by token"
WHOLE = "image to mask"
SHARED = "requests of one image to masks"
POST = "mask at 480 x 640"


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
    if t.name.startswith("peer: image to mask") and (WHOLE, 1) in by:
      lines.append(f"{WHOLE}: {t.seconds / by[WHOLE, 1]:.2f} times {t.name}")
    elif t.name == WHOLE and t.bound:
      share = t.seconds / t.bound
      lines.append(f"{WHOLE}, batch {t.batch}: {share:.2f} times its bound")
  return lines
