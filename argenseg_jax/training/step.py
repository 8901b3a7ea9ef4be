"""One optimisation step of either task, as pure functions for `jax.jit`.

Loss and gradient of a batch are sums over its parts, each divided by counts of
the whole batch. Parts are what one device holds (`shard_map` over the batch
axes) and, within it, what one turn of gradient accumulation takes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from argenseg_jax import sharding
from argenseg_jax.config import ConfigError, LossConfig, RunConfig
from argenseg_jax.models import losses
from argenseg_jax.models.argenseg import (
  ARGenSeg,
  normalize_seg_masks,
)
from argenseg_jax.models.teacher_forcing import (
  Noise,
  draw_noise,
  prepare_inputs,
)
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.training.codebook import usage_and_perplexity
from argenseg_jax.training.state import TrainState
from argenseg_jax.types import Batch

REMAT_POLICIES: dict[str, Callable | bool | None] = {
  "none": False,
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def mllm_loss(
  model: ARGenSeg,
  batch: Batch,
  config: LossConfig,
  *,
  noise: Noise | None = None,
  remat: str = "none",
  counts: losses.TargetCounts | None = None,
) -> tuple[Array, losses.LossSums]:
  """Mean text loss plus mean code loss.

  Args:
    model: the whole model.
    batch: a batch, or a part of one.
    config: how codes are averaged.
    noise: of training; of this part.
    remat: key of `REMAT_POLICIES`.
    counts: of the whole batch, if `batch` is a part of one.
  """
  noise = noise or Noise()
  inputs, targets, code_index = prepare_inputs(model, batch, noise)
  drop_path = noise.drop_path
  if drop_path is not None:
    drop_path = drop_path.reshape(-1, *drop_path.shape[2:])
  hidden = model(
    inputs, remat_policy=REMAT_POLICIES[remat], drop_path=drop_path
  )
  chosen = config.implementation
  sums = losses.decoder_loss(
    hidden,
    model.llm.head,
    targets,
    code_index,
    batch.sample_weight,
    scales=model.scales,
    z_loss=config.z_loss,
    implementation=None if chosen == "auto" else chosen,
  )
  return mllm_objective(sums, config, counts), sums


def mllm_objective(
  sums: losses.LossSums,
  config: LossConfig,
  counts: losses.TargetCounts | None = None,
) -> Array:
  """What training minimises, or the share of a part in it (see `mllm_loss`)."""
  text, code = sums.means(counts)
  if config.code_average == "scale":
    code = jnp.mean(sums.scale_means(counts))
  return text + code


def vqvae_loss(
  model: VQVAE, batch: Batch, *, reconstruction: str, quantize: bool
) -> tuple[Array, dict[str, Array]]:
  """Reconstruction plus quantiser loss, means over all masks of a batch.

  Args:
    model: the image tokenizer.
    batch: only its seg_masks are used.
    reconstruction: "mse" or "bce_dice".
    quantize: False trains a plain autoencoder (warm start).
  """
  images = normalize_seg_masks(batch.seg_masks)
  images = images.reshape(-1, *images.shape[2:])
  out = model(images, quantize=quantize)
  if reconstruction == "mse":
    fit = jnp.mean((out.images - images) ** 2)
  else:
    fit = losses.seg_mask_loss(out.images, images)
  metrics = {"reconstruction": fit, "vq": out.vq_loss}
  if quantize:
    metrics["counts"] = model.quantizer.count_codes(out.codes)
  return fit + out.vq_loss, metrics


def make_train_step(
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  config: RunConfig,
  task: str,
  *,
  mesh: Mesh,
  quantize: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """A function (state, batch) -> (state, metrics), to be jitted.

  Where the loss or the gradient's norm is not finite, only the step count
  changes and the metric "skipped" is True.

  Args:
    graph: of the module that `task` trains.
    optimizer: from `optimizer.make_optimizer`.
    config: of the run.
    task: "vqvae" or "mllm".
    mesh: that state and batch live on.
    quantize: False while an image tokenizer warms up without its quantiser.
  """
  stage = config.stage(task)
  accumulate = stage.train.accumulate_steps
  parts = accumulate * sharding.num_shards(mesh)
  if stage.train.global_batch_size % parts:
    raise ConfigError(
      f"global_batch_size {stage.train.global_batch_size} does not divide into "
      f"{parts} parts (accumulate_steps {accumulate} times mesh axes slice, "
      "data and fsdp)."
    )

  def part_loss(params, fixed, batch, noise, counts):
    """A part's share in the loss, and what to sum over parts."""
    model = nnx.merge(graph, *_whole_tables((params, fixed)))
    if task == "mllm":
      return mllm_loss(
        model,
        batch,
        config.loss,
        noise=noise,
        remat=stage.train.remat,
        counts=counts,
      )
    loss, sums = vqvae_loss(
      model,
      batch,
      reconstruction=config.tokenizer_training.reconstruction,
      quantize=quantize,
    )
    # Parts are of one size: the mean of their means is the whole mean.
    sums |= {k: v / parts for k, v in sums.items() if k != "counts"}
    return loss / parts, sums

  def gradients(params, fixed, batch, noise, counts):
    """Of all parts that this code sees, one after the other."""
    grad = jax.grad(part_loss, has_aux=True)
    cast = _cast_split((params, fixed), stage.train.compute_dtype)
    if accumulate == 1:
      return grad(*cast, batch, noise, counts)
    turns = jax.tree.map(
      lambda x: x.reshape(accumulate, -1, *x.shape[1:]), (batch, noise)
    )

    def add(total, turn):
      new = grad(*cast, *turn, counts)
      return jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new), None

    first = jax.tree.map(lambda x: x[0], turns)
    shapes = jax.eval_shape(grad, *cast, *first, counts)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(
        x.shape,
        jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype,
      ),
      shapes,
    )
    return lax.scan(add, zeros, turns)[0]

  def sharded_gradients(params, fixed, batch, noise, counts):
    rows = PartitionSpec(sharding.BATCH_AXES)
    specs = sharding.local_specs(params)
    manual = set(mesh.axis_names)
    if mesh.shape["tensor"] > 1:
      manual.remove("tensor")  # XLA splits heads and MLPs by itself.

    def local(params, fixed, batch, noise, counts):
      grads, sums = gradients(params, fixed, batch, noise, counts)
      sums = jax.tree.map(lambda x: lax.psum(x, sharding.BATCH_AXES), sums)
      return sharding.sum_gradients(grads), sums

    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(
        specs,
        sharding.local_specs(fixed),
        rows,
        rows,
        PartitionSpec(),
      ),
      out_specs=(specs, PartitionSpec()),
      axis_names=manual,
      check_vma=False,
    )(params, fixed, batch, noise, counts)

  def step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    noise, counts = Noise(), None
    if task == "mllm":
      model = nnx.merge(graph, state.params, state.fixed)
      noise = draw_noise(model, batch, config.loss, key)
      counts = losses.count_targets(
        batch.targets,
        losses.code_indices(batch.targets, model.scales.num_codes),
        batch.sample_weight,
        model.scales,
      )
    whole = sharding.num_shards(mesh) == 1  # XLA does `tensor` by itself.
    split = gradients if whole else sharded_gradients
    grads, sums = split(state.params, state.fixed, batch, noise, counts)
    usage = state.usage
    if task == "mllm":
      text, code = sums.means()
      metrics = {
        "loss": mllm_objective(sums, config.loss),
        "text_loss": text,
        "code_loss": code,
        "scale_loss": sums.scale_means(),
      }
    else:
      metrics = {"loss": sums["reconstruction"] + sums["vq"]}
      metrics |= {k: v for k, v in sums.items() if k != "counts"}
      if quantize:
        usage = usage + jnp.sum(sums["counts"], 0, dtype=usage.dtype)
        used, perplexity = usage_and_perplexity(sums["counts"])
        metrics |= {"codes_used": used, "perplexity": perplexity}
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
      average = update_average(
        average, params, state.step, stage.optimizer.ema_decay
      )
    new = state._replace(
      params=params, optimizer=opt_state, usage=usage, average=average
    )
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    metrics["skipped"] = ~finite
    return new._replace(step=state.step + 1), metrics

  return step


def update_average(
  average: nnx.State, params: nnx.State, step: Array, decay: float
) -> nnx.State:
  """Moves the average towards `params`, faster at the beginning."""
  keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(
    lambda a, p: (a + (1 - keep) * (p - a)).astype(a.dtype), average, params
  )


def _cast_split(state: Any, dtype: str) -> Any:
  """Shards that will be gathered, in the dtype that they are used in: half the
  traffic in bfloat16, for parameters and gradients alike."""
  if not sharding.gathers():
    return state

  def cast(variable):
    if not sharding.is_split(variable):
      return variable
    return variable.replace(variable[...].astype(dtype))

  return jax.tree.map(
    cast, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )


def _whole_tables(states: Any) -> Any:
  """Gathers what belongs to no stack of layers; `layer_scan` does those."""

  def whole(variable):
    if "layers" in variable.get_metadata().get("axes", ()):
      return variable
    return sharding.gathered(variable)

  return jax.tree.map(
    whole, states, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
