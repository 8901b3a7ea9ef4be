"""`argenseg bench kernels`: memory, work and time of the fused operations."""

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from argenseg_jax.tools.bench import timing
from argenseg_jax.tools.common import temp_bytes

EXAMPLE = """\
examples:
  argenseg bench kernels                 time on this machine
  argenseg bench kernels --chips=v5e     compile for a chip you don't have

Compiling needs the chip's compiler: pip install "jax[tpu]" or "jax[cuda12]",
each in an environment of its own. Tables are in Markdown. GFLOP and GB are the
compiler's counts of a program; ms is the time the chip needs for the larger of
them (one JAX device: half a chip of tpu7x). tokamax is compiled, too, for TPUs
where it is installed. Timed programs take turns; "against naive" is the median
over the turns of a program's time over the naive one's in the same turn. On a
CPU that is the time of all its cores, which other programs disturb least.
"""


class Case(NamedTuple):
  """An operation at one shape, as several programs of the same inputs."""

  name: str
  programs: dict[str, Callable[..., Any]]
  inputs: tuple[Any, ...]  # jax.ShapeDtypeStruct
  matrix: int  # Bytes of its logits or distances in float32.
  flops: int  # That the operation itself needs.

  def inputs_of(self, program: str) -> tuple[Any, ...]:
    """`inputs`; tokamax has its head the other way round: [width words]."""
    if program != "tokamax":
      return self.inputs
    import jax

    hidden, head, *rest = self.inputs
    return hidden, jax.ShapeDtypeStruct(head.shape[::-1], head.dtype), *rest


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg bench kernels",
    description="Memory, work and time of the fused operations.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--chips",
    default="",
    help="comma-separated chips to compile for instead of timing",
  )
  parser.add_argument(
    "--repeats", type=int, default=20, help="runs of each program to time"
  )
  timing.add_profile_option(parser)
  args = parser.parse_args(argv)
  if args.repeats < 1:
    parser.error("--repeats must be at least 1")
  if not args.chips:
    with timing.traces_into(args.profile):
      _time_all(args.repeats)
    return 0
  if args.profile:
    parser.error("--profile needs programs that run; --chips only compiles")
  # Before jax: GPU programs compile where there is no GPU.
  os.environ["JAX_PLATFORMS"] = "cpu"
  from argenseg_jax.kernels.chips import CHIPS
  from argenseg_jax.planning import topology

  chips = args.chips.split(",")
  if unknown := sorted(set(chips) - set(CHIPS)):
    parser.error(f"unknown chip {unknown[0]!r}; use {', '.join(CHIPS)}")
  for chip in chips:
    platform = CHIPS[chip].platform
    if not topology.has_compiler(platform):
      parser.error(
        f"the compiler for {chip} is missing; {topology.install_hint(platform)}"
      )
  _compile_all(chips)
  return 0


def _compile_all(chips):
  import jax

  from argenseg_jax.kernels.chips import CHIPS
  from argenseg_jax.tools.compile_kernels import compile_for

  print(
    "| chip | operation | program | temp MiB | of matrix | GFLOP | GB | ms |"
  )
  print("|---|---|---|---:|---:|---:|---:|---:|")
  for name in chips:
    chip = CHIPS[name]
    for case in _cases(chip.platform, _LARGE, "bfloat16"):
      for program, function in case.programs.items():
        try:
          compiled = compile_for(name, function, case.inputs_of(program))
        except Exception as error:
          full = isinstance(error, jax.errors.JaxRuntimeError)
          full = full and "RESOURCE_EXHAUSTED" in str(error)
          if not full and program != "tokamax":  # Others' faults end no table.
            raise
          print(f"{program} for {name}: {error}", file=sys.stderr)
          cells = ["does not fit" if full else "raises", "", "", "", ""]
        else:
          temp = temp_bytes(compiled)
          cells = [f"{temp / 2**20:.1f}", f"{temp / case.matrix:.2%}"]
          cells += _roofline(compiled, program, chip)
        row = (name, case.name, program, *cells)
        print("| " + " | ".join(row) + " |", flush=True)


def _roofline(compiled, program, chip) -> list[str]:
  """GFLOP, GB and milliseconds; blank where the compiler cannot count."""
  if program == "xla" or chip.platform == "gpu":
    return ["", "", ""]  # It counts a loop's body once, and no GPU kernel.
  cost = compiled.cost_analysis()
  if "flops" not in cost:
    return ["", "", ""]
  flops, size = cost["flops"], cost["bytes accessed"]
  seconds = max(flops / chip.flops, size / chip.bandwidth) * chip.devices
  return [f"{flops / 1e9:.0f}", f"{size / 1e9:.2f}", f"{seconds * 1e3:.2f}"]


def _time_all(repeats):
  import jax
  import jax.numpy as jnp

  platform = jax.default_backend()
  device = jax.devices()[0]
  on_cpu = platform == "cpu"
  print(f"{device.device_kind}, jax {jax.__version__}", end="")
  ceiling = None
  if not on_cpu:
    side = 8192
    a = jnp.ones((side, side), jnp.bfloat16)
    turns = _time({"": jax.jit(jnp.matmul)}, (a, a), repeats)[""]
    ceiling = 2 * side**3 / min(turn.wall for turn in turns)
    print(f", {ceiling / 1e12:.0f} TFLOP/s in a product of {side}", end="")
  kinds = "| least ms | median ms | against naive | of ceiling |"
  if on_cpu:
    kinds = "| least ms | median CPU ms | against naive |"
  print(f"\n\n| operation | program | temp MiB {kinds}")
  print("|---|---" + "|---:" * kinds.count("|", 1) + "|")
  shapes, dtype = (_SMALL, "float32") if on_cpu else (_LARGE, "bfloat16")
  for case in _cases(platform, shapes, dtype):
    arrays = _random(case.inputs)
    compiled = {
      name: jax.jit(function).lower(*arrays).compile()
      for name, function in case.programs.items()
      if name != "tokamax"
    }
    times = _time(compiled, arrays, repeats)
    for name, program in compiled.items():
      run = functools.partial(_wait, program, arrays)
      timing.trace(f"{case.name}, {name}", run)
    naive = times["naive"]
    for name, turns in times.items():
      temp = temp_bytes(compiled[name]) / 2**20
      least = min(turn.wall for turn in turns)
      median = statistics.median(turn.busy for turn in turns)
      ratio = statistics.median(
        a.busy / b.busy for a, b in zip(turns, naive, strict=True)
      )
      cells = [f"{temp:.2f}", f"{least * 1e3:.3f}", f"{median * 1e3:.3f}"]
      cells.append(f"{ratio:.2f}")
      if ceiling:
        cells.append(f"{case.flops / least / ceiling:.0%}")
      print("| " + " | ".join((case.name, name, *cells)) + " |", flush=True)


class _Turn(NamedTuple):
  """One run of a program."""

  wall: float  # Seconds.
  busy: float  # Seconds of all CPU cores; the same as `wall` elsewhere.


def _time(programs, arrays, repeats) -> dict[str, list[_Turn]]:
  """Runs of each program, after one unmeasured.

  They take turns, so that what else the machine does disturbs all alike.
  """
  import jax

  on_cpu = jax.default_backend() == "cpu"
  turns = {name: [] for name in programs}
  for repeat in range(repeats + 1):
    for name, program in programs.items():
      start, busy_start = time.perf_counter(), time.process_time()
      _wait(program, arrays)
      wall = time.perf_counter() - start
      busy = time.process_time() - busy_start if on_cpu else wall
      if repeat:
        turns[name].append(_Turn(wall, busy))
  return turns


def _wait(program, arrays):
  import jax

  return jax.block_until_ready(program(*arrays))


def _random(structs):
  import jax.numpy as jnp
  import numpy as np

  rng = np.random.default_rng(0)

  def one(struct):
    if np.issubdtype(struct.dtype, np.integer):
      # Words and codes: below every number of them here.
      return jnp.asarray(rng.integers(0, 200, struct.shape), struct.dtype)
    numbers = rng.standard_normal(struct.shape, dtype=np.float32)
    return jnp.asarray(0.05 * numbers, struct.dtype)

  return tuple(map(one, structs))


class _Shapes(NamedTuple):
  # Tokens, width, words, and the share of tokens that bear loss.
  losses: list[tuple[int, int, int, float]]
  predictions: list[tuple[int, int, int, int]]  # rows, width, codes, channels
  codes: list[tuple[int, int, int]]  # latents, channels, codes


# The quickstart's (as it is, and if all tokens bore loss), and one that is
# large for a CPU.
_SMALL = _Shapes(
  losses=[(2784, 96, 742, 0.44), (2784, 96, 742, 1), (1024, 256, 20_000, 1)],
  predictions=[(16 * 64, 96, 256, 16)],
  codes=[(64 * 64, 16, 256), (64 * 256, 32, 4096)],
)
_LARGE = _Shapes(
  losses=[(8192, 4096, 96_653, 1), (16_384, 896, 151_674, 1)],
  predictions=[(256, 4096, 4096, 32), (64 * 256, 4096, 4096, 32)],
  codes=[(64 * 256, 32, 4096)],
)


def _cases(platform: str, shapes: _Shapes, dtype: str) -> Iterator[Case]:
  import jax
  import jax.numpy as jnp
  import numpy as np

  from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
  from argenseg_jax.kernels.nearest_code import nearest_code
  from argenseg_jax.kernels.scale_prediction import scale_prediction

  kernel = [] if platform == "cpu" else [platform]

  def struct(kind, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(kind))

  def programs(make):
    names = {**{k: k for k in kernel}, "xla": "xla", "naive": "reference"}
    return {name: make(option) for name, option in names.items()}

  def loss_of(implementation, bears):
    def total(hidden, head, targets, weights):
      weights = jnp.where(bears, weights, 0.0)
      return jnp.sum(
        linear_cross_entropy(
          hidden, head, targets, weights, implementation=implementation
        )
      )

    return jax.value_and_grad(total, argnums=(0, 1))

  def codes_of(implementation):
    def predict(*inputs):
      return scale_prediction(*inputs, implementation=implementation)[:2]

    return predict

  for t, d, words, share in shapes.losses:
    bears = np.random.default_rng(0).random(t) < share
    inputs = (
      struct(dtype, t, d),
      struct(dtype, words, d),
      struct("int32", t),
      struct("float32", t),
    )
    some = programs(functools.partial(loss_of, bears=bears))
    if platform == "tpu" and importlib.util.find_spec("tokamax"):
      some["tokamax"] = _tokamax_loss
    name = f"loss and gradients, {t} x {words} x {d}"
    if share < 1:
      name += f", {share:.0%} bear loss"
    yield Case(name, some, inputs, 4 * t * words, 6 * t * words * d)
  for r, d, codes, c in shapes.predictions:
    inputs = (
      struct(dtype, 1, r, d),
      struct(dtype, codes, d),
      struct("float32", codes, c),
    )
    some = programs(codes_of)
    name = f"prediction, {r} x {codes} x {d}"
    yield Case(name, some, inputs, 4 * r * codes, 2 * r * codes * d)
  for n, c, codes in shapes.codes:
    inputs = (struct("float32", n, c), struct("float32", codes, c))
    some = programs(
      lambda option: functools.partial(nearest_code, implementation=option)
    )
    name = f"nearest code, {n} x {codes} x {c}"
    yield Case(name, some, inputs, 4 * n * codes, 2 * n * codes * c)


def _tokamax_loss(hidden, head, targets, weights):
  """Without weights, which tokamax does not know."""
  import jax
  import tokamax
  from absl import flags

  del weights
  if not flags.FLAGS.is_parsed():  # Else it would parse ours.
    flags.FLAGS.mark_as_parsed()

  def total(hidden, head):
    return tokamax.linear_softmax_cross_entropy_loss(
      hidden, targets, head, reduction="sum", implementation="mosaic_tpu"
    )

  return jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
