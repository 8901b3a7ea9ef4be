"""Causal attention on TPUs without the matrix of scores in memory."""

from typing import cast

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import dispatch
from argenseg_jax.models import remat

_BLOCK = 512  # Positions of a block.


def available(length: int) -> bool:
  """Whether `attend` can run here: on a TPU, in code that XLA does not split,
  on sequences of whole vector registers."""
  on_tpu = dispatch.target().platform == "tpu"
  return on_tpu and not dispatch.partitioned() and length % 128 == 0


def attend(
  queries: Float[Array, "b t heads hd"],
  keys: Float[Array, "b t kv hd"],
  values: Float[Array, "b t kv hd"],
  *,
  segment_ids: Int[Array, "b t"],
) -> Float[Array, "b t heads hd"]:
  """Causal attention within segments, by JAX's splash attention.

  Equal to `attention.attend` with the mask of `attention_mask`, but for
  padding (segment 0), which sees itself here.
  """
  b, t, heads, hd = queries.shape
  groups = keys.shape[2]
  kernel = _kernel(t, heads // groups)
  q, k, v = (
    x.reshape(b, t, groups, -1, hd).transpose(0, 2, 3, 1, 4)
    for x in (queries * np.asarray(hd**-0.5, queries.dtype), keys, values)
  )
  # Rows, then key-value heads; the kernel knows several queries for one key.
  one_row = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  segments = splash.SegmentIds(segment_ids, segment_ids)
  # An array alone: this kernel keeps no residuals.
  out = cast(Array, jax.vmap(one_row)(q, k[:, :, 0], v[:, :, 0], segments))
  return out.transpose(0, 3, 1, 2, 4).reshape(b, t, heads, hd)


def _kernel(length: int, queries_per_key: int):
  size = next(s for s in (_BLOCK, 256, 128) if length % s == 0)
  # The backward pass of queries and keys in one kernel.
  sizes = splash.BlockSizes(
    block_q=size,
    block_kv=size,
    block_kv_compute=size,
    block_q_dkv=size,
    block_kv_dkv=size,
    block_kv_dkv_compute=size,
    use_fused_bwd_kernel=True,
  )
  mask = splash.MultiHeadMask(
    [splash.CausalMask((length, length))] * queries_per_key
  )
  # What the backward pass needs has the name of the result.
  return splash.make_splash_mqa_single_device(
    mask, block_sizes=sizes, residual_checkpoint_name=remat.ATTENTION
  )
