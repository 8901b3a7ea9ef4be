"""Prediction of one scale with a code head that is split by codes (tensor)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from argenseg_jax.kernels import dispatch, noise
from argenseg_jax.kernels.scale_prediction import Scores, check_top_k, xla


def sharded_scale_prediction(
  hidden: Float[Array, "b n d"],
  code_head: Float[Array, "codes d"],
  codebook: Float[Array, "codes c"],
  *,
  key: Key[Array, ""] | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  batch_axes: tuple[str, ...] = ("data", "fsdp"),
  codes_axis: str = "tensor",
  implementation: dispatch.Implementation | None = None,
) -> tuple[Int[Array, "b n"], Float[Array, "b n c"], Scores]:
  """`scale_prediction` on the mesh of `jax.set_mesh`: the same codes.

  Each device predicts from its own codes; the best score is agreed upon by a
  maximum over the devices, and ties by a minimum over the code ids. With
  `top_k`, devices show each other their highest logits, in blocked XLA.

  Args:
    hidden: [batch_axes, -, -] sharded.
    code_head: [codes_axis, -] sharded, in the dtype of `hidden`.
    codebook: replicated.
    key: random key, needed with a temperature.
    temperature: 0 takes the arg-max.
    top_k: as in `scale_prediction`.
    batch_axes: mesh axes of the batch; () if it is replicated.
    codes_axis: mesh axis of the codes.
    implementation: see `dispatch.load`.

  Raises:
    ValueError: a temperature without key, a `top_k` outside 1..codes or with
      a kernel, or codes that do not divide over their axis.
  """
  if temperature < 0 or (temperature and key is None):
    raise ValueError(
      f"temperature {temperature} needs a random key and must not be negative."
    )
  check_top_k(top_k, code_head.shape[0])
  if top_k is not None and implementation in ("tpu", "gpu"):
    raise ValueError(
      f"sharded prediction with top_k has no {implementation!r} form; use "
      "implementation='xla'."
    )
  shards = jax.sharding.get_abstract_mesh().shape[codes_axis]
  if code_head.shape[0] % shards:
    raise ValueError(
      f"{code_head.shape[0]} codes do not divide over the {shards} devices of "
      f"mesh axis {codes_axis!r}."
    )
  hidden, code_head, codebook = lax.stop_gradient((hidden, code_head, codebook))
  batch = P(batch_axes)

  @functools.partial(
    jax.shard_map,
    in_specs=(batch, P(codes_axis), P(codes_axis), P()),
    out_specs=(batch, Scores(batch, batch)),
    check_vma=False,
  )
  def predict(hidden, code_head, codebook, key):
    b, n, d = hidden.shape
    first_code = lax.axis_index(codes_axis) * code_head.shape[0]
    first_row = lax.axis_index(batch_axes) * b * n if batch_axes else 0
    seed = None
    if temperature:
      seed = noise.make_seed(key, first_row=first_row, first_column=first_code)
    hidden = hidden.reshape(b * n, d)
    lowest, options = None, {}
    if temperature and top_k is not None:
      local_k = min(top_k, code_head.shape[0])
      highest = xla.highest_logits(hidden, code_head, local_k)
      highest = lax.all_gather(highest, codes_axis, axis=1, tiled=True)
      lowest = lax.top_k(highest, top_k)[0][:, -1]
      module, options = xla, {"lowest": lowest}
    else:
      module = dispatch.load("scale_prediction", implementation)
    codes, _, logits, log_sum_exp = module.predict(
      hidden,
      code_head,
      codebook,
      seed=seed,
      temperature=float(temperature),
      top_k=None,
      **options,
    )
    scores = logits
    if temperature:
      rows = jnp.arange(b * n, dtype=jnp.int32)
      scores = logits / temperature + noise.gumbel(seed, rows, codes)
    if lowest is not None:
      # A device may have none of the highest.
      scores = jnp.where(logits >= lowest, scores, -jnp.inf)
    best = lax.pmax(scores, codes_axis)
    largest = np.iinfo(np.int32).max
    # No number equals NaN; a row of them still gets the id of a code.
    won = (scores == best) | jnp.isnan(scores)
    mine = jnp.where(won, codes + first_code, largest)
    chosen = lax.pmin(mine, codes_axis)
    logits = jnp.where(mine == chosen, logits, 0.0)
    logits = lax.psum(logits, codes_axis)
    peak = lax.pmax(log_sum_exp, codes_axis)
    total = lax.psum(jnp.exp(log_sum_exp - peak), codes_axis)
    shape = (b, n)
    scores = Scores(
      logits.reshape(shape), (peak + jnp.log(total)).reshape(shape)
    )
    return chosen.reshape(shape), scores

  key = jax.random.key(0) if key is None else key
  codes, scores = predict(hidden, code_head, codebook, key)
  return codes, jnp.take(codebook, codes, axis=0), scores
