"""Constructing modules: random keys in batches, shapes without arrays."""

import contextvars
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

M = TypeVar("M", bound=nnx.Module)

_shapes_only = contextvars.ContextVar("shapes_only", default=False)
_BATCH = 64


def abstract(make: Callable[..., M], *args) -> M:
  """What `make` constructs of `args`, with shapes and types in place of arrays.

  `nnx.eval_shape` alone would trace every initializer and its random key, which
  takes longer than the rest of the constructor.
  """
  token = _shapes_only.set(True)
  try:
    return nnx.eval_shape(make, *args)
  finally:
    _shapes_only.reset(token)


def is_abstract() -> bool:
  """Whether `abstract` runs the constructor: any value of the shape will do."""
  return _shapes_only.get()


class Rngs:
  """The keys of `nnx.Rngs(seed).params`, derived 64 at a time.

  One by one they are most of what compiling a constructor takes.
  """

  def __init__(self, seed: int | jax.Array):
    """`seed` is a number or a key."""
    self._key = jax.random.key(seed) if isinstance(seed, int) else seed
    self._batch: jax.Array | None = None
    self._count = 0

  def params(self) -> jax.Array:
    """The next key."""
    place = self._count % _BATCH
    if self._batch is None or not place:
      counts = jnp.arange(self._count, self._count + _BATCH, dtype=jnp.uint32)
      self._batch = jax.vmap(jax.random.fold_in, (None, 0))(self._key, counts)
    self._count += 1
    return self._batch[place]
