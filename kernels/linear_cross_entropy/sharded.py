"""Cross-entropy of a sharded head, with its collectives written out.

Rows (tokens) are split over some mesh axes. The head may be split twice: its
width over one of the rows' axes (fsdp) and its words over another axis
(tensor). Per step, whatever the number of blocks:

  forward   all-gather of the head's width; two numbers per token over tensor
  backward  all-reduce of d_hidden over tensor; reduce-scatter of d_head's
            width, and all-reduce of the scattered part over the other row axes

Left to itself, XLA reduces the gradient of the whole head in every block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels import dispatch
from argenseg_jax.kernels.collectives import scatter_sum
from argenseg_jax.kernels.linear_cross_entropy import xla


class Layout(NamedTuple):
  """Mesh axes over which the arrays are split."""

  rows: tuple[str, ...] = ("data", "fsdp")  # Tokens.
  width: str | None = "fsdp"  # Columns of the head; one of `rows`.
  words: str | None = "tensor"  # Rows of the head.


HOUSE_LAYOUT = Layout()


def sharded_linear_cross_entropy(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  weights: Float[Array, "t"],
  *,
  layout: Layout = HOUSE_LAYOUT,
  z_loss: float = 0.0,
  implementation: dispatch.Implementation | None = None,
) -> Float[Array, "t"]:
  """`linear_cross_entropy` on the mesh of `jax.set_mesh`.

  Differentiable once, with respect to `hidden`, `head` and `weights`. The
  gathered head is kept from the forward to the backward pass.

  Args:
    hidden: [rows, -] sharded; bfloat16 or float32.
    head: [words, width] sharded; in the dtype of `hidden`.
    targets: [rows] sharded; int32, any value where the weight is 0.
    weights: [rows] sharded; float32.
    layout: mesh axes of the above.
    z_loss: weight of the squared log-sum-exp.
    implementation: "xla", "tpu", or None to pick by platform.

  Raises:
    ValueError: dtypes that differ, a width axis that is no row axis, or words
      that do not divide over their axis.
  """
  if hidden.dtype != head.dtype:
    raise ValueError(
      f"hidden is {hidden.dtype} and head is {head.dtype}; cast one of them."
    )
  if layout.width is not None and layout.width not in layout.rows:
    raise ValueError(
      f"the head's width axis {layout.width!r} must be one of the row axes "
      f"{layout.rows}."
    )
  if layout.words is not None:
    shards = jax.sharding.get_abstract_mesh().shape[layout.words]
    if head.shape[0] % shards:
      raise ValueError(
        f"{head.shape[0]} words do not divide over the {shards} devices of "
        f"mesh axis {layout.words!r}; pad the vocabulary or use "
        "Layout(words=None)."
      )
  options = layout, z_loss, implementation
  losses = _token_losses(options, hidden, head, targets, weights != 0)
  return weights * losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(options, hidden, head, targets, bears):
  return _forward(options, hidden, head, targets, bears)[0]


def _forward(options, hidden, head, targets, bears):
  layout, z_loss, implementation = options
  rows = P(layout.rows)

  @functools.partial(
    jax.shard_map,
    in_specs=(rows, P(layout.words, layout.width), rows, rows),
    out_specs=(rows, rows, P(layout.words)),
    check_vma=False,
  )
  def forward(hidden, head, targets, bears):
    module = dispatch.load("linear_cross_entropy", implementation)
    if layout.width is not None:
      head = lax.all_gather(head, layout.width, axis=1, tiled=True)
    targets = targets - _first_word(head, layout)
    normalizers, logits = module.statistics(
      hidden, head, targets, **_skips(module, bears)
    )
    if layout.words is not None:
      peak = lax.pmax(normalizers, layout.words)
      total = lax.psum(jnp.exp(normalizers - peak), layout.words)
      normalizers = peak + jnp.log(total)
      logits = lax.psum(logits, layout.words)
    return normalizers, logits, head

  normalizers, logits, gathered = forward(hidden, head, targets, bears)
  losses = normalizers - logits + z_loss * jnp.square(normalizers)
  return losses, (hidden, gathered, targets, bears, normalizers)


def _backward(options, residuals, gradients):
  layout, z_loss, implementation = options
  hidden, head, targets, bears, normalizers = residuals
  rows = P(layout.rows)

  @functools.partial(
    jax.shard_map,
    in_specs=(rows, P(layout.words), *[rows] * 5),
    out_specs=(rows, P(layout.words, layout.width)),
    check_vma=False,
  )
  def backward(
    hidden, head, targets, bears, normalizers, d_normalizers, d_logits
  ):
    module = dispatch.load("linear_cross_entropy", implementation)
    d_hidden, d_head = module.gradients(
      hidden,
      head,
      targets - _first_word(head, layout),
      normalizers=normalizers,
      d_normalizers=d_normalizers,
      d_logits=d_logits,
      **_skips(module, bears),
    )
    if layout.words is not None:
      d_hidden = lax.psum(d_hidden, layout.words)
    if layout.width is not None:
      d_head = scatter_sum(d_head, layout.width, dimension=1)
    others = tuple(axis for axis in layout.rows if axis != layout.width)
    return d_hidden, lax.psum(d_head, others)

  d_normalizers = gradients * (1 + 2 * z_loss * normalizers)
  d_hidden, d_head = backward(
    hidden, head, targets, bears, normalizers, d_normalizers, -gradients
  )
  return d_hidden, d_head, None, None


def _skips(module, bears):
  """Options of the implementation that can leave tokens out."""
  return {"bears": bears} if module is xla else {}


def _first_word(head, layout):
  """Id of the first word of this device's part of the head."""
  if layout.words is None:
    return 0
  return lax.axis_index(layout.words) * head.shape[0]


_token_losses.defvjp(_forward, _backward)
