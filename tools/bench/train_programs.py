"""The training step that `argenseg bench device` times."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import checkpoint, construct, sharding
from argenseg_jax.config import RunConfig
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import base
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import flops
from argenseg_jax.tools.bench.timing import median_seconds, trace
from argenseg_jax.tools.bench.train import make_batch
from argenseg_jax.tools.common import temp_bytes
from argenseg_jax.training import state as train_state
from argenseg_jax.training.step import make_train_step
from argenseg_jax.training.tasks import DECODER


class Step(NamedTuple):
  """A timed step."""

  rows: int
  tokens: int
  seconds: float
  flops: float  # Of the model, nothing computed again.
  trace_seconds: float
  compile_seconds: float
  temp_mib: float
  loss: float


def step(
  config: ModelConfig,
  rows: int,
  *,
  remat: str,
  implementation: str,
  fill: Callable[[nnx.State], nnx.State],
) -> Step:
  """One step of `argenseg train`: bfloat16, AdamW, the codes known before.

  Args:
    implementation: of the loss.
    fill: makes arrays of shapes.
  """
  run = _run(rows, remat, implementation)
  mesh = sharding.make_mesh(run.mesh)
  train = run.mllm.train
  make = checkpoint.model_factory(
    "mllm",
    config,
    seed=0,
    dtype=jnp.dtype(train.compute_dtype),
    param_dtype=jnp.dtype(train.param_dtype),
  )
  batch = make_batch(config, rows)
  n = sum(side * side for side in config.vqvae.scales)
  codes = np.random.default_rng(0).integers(0, config.vqvae.num_codes, n)
  batch = batch._replace(
    codes=np.tile(codes.astype(np.int32), (rows, 1, 1)),
    seg_masks=batch.seg_masks[:, :, :0],
  )
  with jax.set_mesh(mesh):
    began = time.perf_counter()
    described = train_state.describe(
      *nnx.split(construct.abstract(make)),
      run.mllm,
      num_codes=config.vqvae.num_codes,
      mesh=mesh,
    )
    program = jax.jit(
      make_train_step(
        described.graph, described.optimizer, run, DECODER, mesh=mesh
      ),
      donate_argnums=0,
      out_shardings=(described.shardings, None),
    )
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    lowered = program.lower(described.state, placed)
    traced = time.perf_counter()
    compiled = lowered.compile()
    finished = time.perf_counter()
    state = described.begin(fill(described.state.variables))
    metrics = {}

    def once():
      nonlocal state, metrics
      state, metrics = compiled(state, placed)
      jax.block_until_ready((state, metrics))

    once()
    seconds = median_seconds(once, 10)
    trace(f"train {config.name}, batch {rows}", once)
  products = flops.mllm(
    config,
    length=batch.tokens.shape[1],
    images=1,
    seg_masks=1,
    tokenized=True,
  )
  count = flops.train_step(products, run.mllm, constant=DECODER.constant)
  return Step(
    rows=rows,
    tokens=batch.tokens.size,
    seconds=seconds,
    flops=count.model,
    trace_seconds=traced - began,
    compile_seconds=finished - traced,
    temp_mib=temp_bytes(compiled) / 2**20,
    loss=float(metrics["loss"]),
  )


def _run(rows: int, remat: str, implementation: str) -> RunConfig:
  values = base.get_config()
  run = run_config(values, needs_data=False)
  train = dataclasses.replace(
    run.mllm.train,
    global_batch_size=rows,
    accumulate_steps=1,
    compute_dtype="bfloat16",
    remat=remat,
  )
  return dataclasses.replace(
    run,
    mllm=dataclasses.replace(run.mllm, train=train),
    loss=dataclasses.replace(run.loss, implementation=implementation),
  )
