"""What the decoder's layers keep for the backward pass; the rest is computed
again.

A policy names values of a layer that are kept. Whatever it is, a layer's input
is kept, its weights are gathered again, and its last product is not repeated:
nothing needs it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

# Values of a decoder layer that can be kept, in the order in which it makes
# them: the products that attention starts with, its result (named by kernels
# that need not run again then), what the MLP's norm reads, and the MLP's two
# first products.
QKV, ATTENTION, MLP_INPUT, MLP_HIDDEN = VALUES = (
  "queries_keys_values",
  "attention",
  "mlp_input",
  "mlp_hidden",
)


class Remat(NamedTuple):
  """A policy.

  Attributes:
    policy: for `layers.layer_scan`: False keeps everything, None nothing.
    keeps: values of a layer that are kept.
    offloads: whether those wait in the host's memory.
  """

  policy: Callable | bool | None
  keeps: tuple[str, ...]
  offloads: bool = False


def _keeping(*names: str) -> Remat:
  save = jax.checkpoint_policies.save_only_these_names(*names)
  return Remat(save, names)


def _offloading(*names: str) -> Remat:
  move = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(names),
    offload_src="device",
    offload_dst="pinned_host",
  )
  return Remat(move, names, offloads=True)


# From the least memory to the most; "offload" has that of "full".
POLICIES = {
  "full": Remat(None, ()),
  "offload": _offloading(QKV, ATTENTION, MLP_INPUT),
  "attention": _keeping(ATTENTION),
  "mlp_inputs": _keeping(ATTENTION, MLP_INPUT),
  "all_but_mlp": _keeping(QKV, ATTENTION, MLP_INPUT),
  "dots": Remat(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    (QKV, MLP_INPUT, MLP_HIDDEN),
  ),
  "none": Remat(False, VALUES),
}


def named(x: Array, name: str) -> Array:
  """`x`, which policies may keep by this name."""
  return checkpoint_name(x, name)
