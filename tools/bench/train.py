"""`argenseg bench train`: what a training step of the decoder costs."""

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from argenseg_jax.config import ConfigError
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models.remat import POLICIES
from argenseg_jax.tools.bench import timing
from argenseg_jax.tools.common import temp_bytes
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET, Batch

EXAMPLE = """\
examples:
  argenseg bench train --peer          the size "bench", beside PyTorch
  argenseg bench train --remat=full    less memory, more work
  argenseg bench train --variant=tiny --batch=16

A step is loss and gradients of the decoder and what it needs: the vision tower
(no gradient; its connector has one) and the image tokenizer, which makes the
codes (no gradient). No optimizer. Each row has 40 text tokens, of which the
last 20 bear loss, one picture and one mask; weights and pixels are random.

The peer is a PyTorch model of the same sizes on as many threads as this process
may use cores: pip install "torch==2.13.0" transformers. The programs take
turns. Seconds are medians over --repeats, "CPU s" those of all threads;
"temp MiB" is what the compiler sets aside for the step.
"""

_ANSWER = 20  # Text tokens of a row that bear loss.


class Program(NamedTuple):
  """A compiled step, ready to run."""

  run: Callable[[], Any]  # Waits for loss and gradients and returns them.
  temp_mib: float


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg bench train",
    description="What a training step costs, forward and backward.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--variant", default="bench", help="named model size")
  parser.add_argument("--batch", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument(
    "--dtype", default="float32", choices=("float32", "bfloat16")
  )
  parser.add_argument("--remat", default="none", choices=tuple(POLICIES))
  parser.add_argument(
    "--peer", action="store_true", help="take turns with a PyTorch step"
  )
  timing.add_profile_option(parser)
  args = parser.parse_args(argv)
  if args.batch < 1 or args.repeats < 1:
    parser.error("--batch and --repeats must be positive whole numbers")
  from argenseg_jax import variants

  config = variants.get(args.variant)
  import jax

  if args.peer:
    _require_peer(args.dtype, jax.default_backend())
  batch = make_batch(config, args.batch)
  program = ours(config, batch, dtype=args.dtype, remat=args.remat)
  runs = {f"ours, remat {args.remat}": program.run}
  if args.peer:
    from argenseg_jax.tools.bench.peer_training import TrainingPeer

    peer = TrainingPeer(config).eval()
    runs["peer: PyTorch"] = lambda: peer.step(batch)
  print(
    f"{config.name}, {args.dtype}, batch {args.batch} of "
    f"{batch.tokens.shape[1]} positions, {jax.devices()[0].device_kind}, "
    f"jax {jax.__version__}\n"
  )
  found = in_turns(runs, args.repeats)
  with timing.traces_into(args.profile):
    timing.trace(f"train {config.name}, batch {args.batch}", program.run)
  print("| program | s a step | CPU s | tokens/s | temp MiB |")
  print("|---|---:|---:|---:|---:|")
  for name, (seconds, cpu) in found.items():
    temp = f"{program.temp_mib:.1f}" if name.startswith("ours") else ""
    print(
      f"| {name} | {seconds:.3f} | {cpu:.3f} | "
      f"{batch.tokens.size / seconds:.1f} | {temp} |"
    )
  if args.peer:
    (seconds, cpu), (peer_seconds, peer_cpu) = found.values()
    print(
      f"\na training step: {peer_seconds / seconds:.2f} times as fast as the "
      f"peer ({peer_cpu / cpu:.2f} by CPU seconds)"
    )
  return 0


def _require_peer(dtype: str, backend: str) -> None:
  if dtype != "float32" or backend != "cpu":
    raise ConfigError(
      "--peer computes in float32 on a CPU; use --dtype=float32 and "
      "JAX_PLATFORMS=cpu."
    )
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      raise ConfigError(
        f'--peer needs {package}: pip install "torch==2.13.0" transformers.'
      )


def make_batch(config: ModelConfig, rows: int) -> Batch:
  """Words, a picture, words, an answer, one mask that is not tokenised yet."""
  from argenseg_jax.tools.bench.stages import AHEAD, PROMPT_TEXT

  ids, seen = config.token_ids, config.vision.num_embeddings
  n = config.vqvae.codes_per_mask
  start = seen + PROMPT_TEXT
  t, answer = start + n, slice(start - _ANSWER, start)
  rng = np.random.default_rng(0)
  words = rng.integers(10, 11 + ids.first_code // 4, (rows, t), np.int32)
  tokens = words.copy()
  tokens[:, AHEAD : AHEAD + seen] = ids.img_context
  tokens[:, start] = ids.ge_start
  tokens[:, start + 1 :] = ids.mask_context
  targets = np.full((rows, t), IGNORE_TARGET, np.int32)
  targets[:, answer] = np.roll(tokens, -1, 1)[:, answer]
  targets[:, start:] = CODE_TARGET

  def pixels(side):
    return rng.integers(0, 256, (rows, 1, side, side, 3), np.uint8)

  index = np.arange(t, dtype=np.int32)
  return Batch(
    tokens=tokens,
    targets=targets,
    positions=np.tile(index, (rows, 1)),
    segment_ids=np.ones((rows, t), np.int32),
    is_prompt=np.tile(index < answer.start, (rows, 1)),
    images=pixels(config.vision.image_side),
    seg_masks=pixels(config.vqvae.image_side),
    mask_valid=np.ones((rows, 1), bool),
    codes=np.zeros((rows, 1, 0), np.int32),
    sample_weight=np.ones(rows, np.float32),
    sample_id=np.arange(rows, dtype=np.int32),
  )


def ours(
  config: ModelConfig, batch: Batch, *, dtype: str, remat: str
) -> Program:
  """The loss of `argenseg train`, frozen as configs/base.py says, and its
  gradients, on one device."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from argenseg_jax import construct
  from argenseg_jax.config_parsing import run_config
  from argenseg_jax.configs import base
  from argenseg_jax.models.argenseg import ARGenSeg
  from argenseg_jax.training.objectives import mllm_loss
  from argenseg_jax.training.optimizer import trainable_filter

  run = run_config(base.get_config(), needs_data=False)

  def make():
    types = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    return ARGenSeg(config, rngs=construct.Rngs(0), **types)

  abstract = construct.abstract(make)
  trains = trainable_filter(run.mllm.optimizer, nnx.state(abstract))
  graph = nnx.split(abstract, trains, ...)[0]
  params, fixed = jax.jit(lambda: nnx.split(make(), trains, ...)[1:])()

  def loss(params, fixed, batch):
    model = nnx.merge(graph, params, fixed)
    return mllm_loss(model, batch, run.loss, remat=remat)[0]

  inputs = params, fixed, jax.device_put(batch)
  step = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()
  return Program(
    lambda: jax.block_until_ready(step(*inputs)),
    temp_bytes(step) / 2**20,
  )


def in_turns(
  runs: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, tuple[float, float]]:
  """Median wall and CPU seconds of each, one after the other in each turn;
  the first turn does not count."""
  found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
  for _ in range(repeats + 1):
    for name, run in runs.items():
      began = time.perf_counter(), time.process_time()
      run()
      ended = time.perf_counter(), time.process_time()
      found[name].append((ended[0] - began[0], ended[1] - began[1]))
  return {
    name: tuple(np.median(times[1:], axis=0)) for name, times in found.items()
  }
