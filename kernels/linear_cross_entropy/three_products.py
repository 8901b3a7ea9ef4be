"""Loss and gradients of a weighted sum in three products, for any backend.

The weights are known before, so a chunk of tokens can form its gradients in the
forward pass, from the logits that its loss needs anyway; they wait for the
cotangent, a scalar. One chunk of logits is in memory at a time, and the
head's gradient in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from argenseg_jax.kernels.products import even_blocks, product

_LOGITS = 2**26  # Of a chunk, unless told otherwise: 256 MiB in float32.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def total_cross_entropy(
  hidden: Float[Array, "t d"],
  head: Float[Array, "vocab d"],
  targets: Int[Array, "t"],
  weights: Float[Array, "t"],
  z_loss: float = 0.0,
  chunk: int | None = None,
) -> Float[Array, ""]:
  """The sum of what `linear_cross_entropy` returns.

  Differentiable once, with respect to `hidden` and `head`.

  Args:
    hidden, head, targets, weights, z_loss: see `linear_cross_entropy`.
    chunk: most tokens whose logits are in memory at a time.
  """
  return _forward(hidden, head, targets, weights, z_loss, chunk)[0]


def _forward(hidden, head, targets, weights, z_loss, chunk):
  (t, d), vocab = hidden.shape, head.shape[0]
  count, size = even_blocks(t, chunk or max(_LOGITS // vocab, 128))

  def split(x):
    padding = [(0, count * size - t)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  def one(state, inputs):
    total, d_head = state
    hidden, targets, weights = inputs
    logits = product(hidden, head, contract=(1, 1))
    peak = jnp.max(logits, axis=1)
    powers = jnp.exp(logits - peak[:, None])
    sums = jnp.sum(powers, axis=1)
    normalizers = peak + jnp.log(sums)
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    hits = ids == targets[:, None]
    chosen = jnp.sum(jnp.where(hits, logits, 0.0), axis=1)
    losses = normalizers - chosen + z_loss * jnp.square(normalizers)
    total += jnp.sum(weights * losses)
    slope = weights * (1 + 2 * z_loss * normalizers)
    d_logits = (slope / sums)[:, None] * powers
    d_logits -= jnp.where(hits, weights[:, None], 0.0)
    d_logits = d_logits.astype(hidden.dtype)
    d_head += product(d_logits, hidden, contract=(0, 0))
    return (total, d_head), product(d_logits, head).astype(hidden.dtype)

  state = jnp.zeros(()), jnp.zeros((vocab, d), jnp.float32)
  (total, d_head), d_hidden = lax.scan(
    one, state, tuple(map(split, (hidden, targets, weights)))
  )
  d_hidden = d_hidden.reshape(-1, d)[:t]
  return total, (d_hidden, d_head.astype(head.dtype))


def _backward(z_loss, chunk, residuals, gradient):
  del z_loss, chunk
  d_hidden, d_head = (x * gradient.astype(x.dtype) for x in residuals)
  return d_hidden, d_head, None, None


total_cross_entropy.defvjp(_forward, _backward)
