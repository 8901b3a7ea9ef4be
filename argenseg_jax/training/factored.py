"""Second moments of matrices in two vectors each (arXiv 1804.04235).

The second moment of a matrix is taken for the outer product of the means of its
rows and of its columns, which the gradients' squares are averaged into. Other
parameters keep theirs whole.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

_LEAST = 1e-30  # Added to squares.


class FactoredMoments(NamedTuple):
  """Averages of squared gradients, in float32.

  Axes carry the names of the parameter's, so that they are split with it.
  """

  count: Array  # int32 []: updates so far.
  # Of matrices [.. i o] the means of rows [.. i]; of others [..] themselves.
  rows: nnx.State
  columns: nnx.State  # Of matrices the means of columns [.. o]; else nothing.


def scale_by_factored_moments(
  b2: float, eps: float
) -> optax.GradientTransformation:
  """Divides gradients by the root of their second moment.

  Averages are those of the steps that there have been: they start at the first
  gradient, not at 0. The axes "layers" and those of a convolution's window
  count many matrices.

  Args:
    b2: decay of the averages.
    eps: added to the root.
  """

  def init(params: Any) -> FactoredMoments:
    return FactoredMoments(
      count=jnp.zeros((), jnp.int32),
      rows=_map(_row_zeros, params),
      columns=_map(_column_zeros, params),
    )

  def update(updates: Any, state: Any, params: Any = None):
    del params
    count = state.count + 1
    old = jnp.float32(b2) ** state.count.astype(jnp.float32)
    keep = b2 * (1 - old) / (1 - b2 * old)

    def average(mean, square):
      return keep * mean + (1 - keep) * square

    def one(grad, rows, columns):
      square = jnp.square(grad[...]) + _LEAST
      if not _is_matrix(grad):
        rows = rows.replace(average(rows[...], square))
        second = rows[...]
      else:
        rows = rows.replace(average(rows[...], jnp.mean(square, -1)))
        columns = columns.replace(average(columns[...], jnp.mean(square, -2)))
        share = rows[...] / jnp.mean(rows[...], -1, keepdims=True)
        second = share[..., :, None] * columns[...][..., None, :]
      scaled = grad.replace(grad[...] / (jnp.sqrt(second) + eps))
      return scaled, rows, columns

    found = [
      one(*leaves)
      for leaves in zip(
        *(_leaves(tree) for tree in (updates, state.rows, state.columns)),
        strict=True,
      )
    ]
    scaled, rows, columns = (
      jax.tree.unflatten(
        jax.tree.structure(updates, is_leaf=_is_variable), part
      )
      for part in zip(*found, strict=True)
    )
    return scaled, FactoredMoments(count, rows, columns)

  return optax.GradientTransformation(init, update)


def _is_variable(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def _leaves(tree: Any) -> list[nnx.Variable]:
  return jax.tree.leaves(tree, is_leaf=_is_variable)


def _map(function: Any, tree: nnx.State) -> nnx.State:
  return jax.tree.map(function, tree, is_leaf=_is_variable)


def _is_matrix(variable: nnx.Variable) -> bool:
  axes = [a for a in variable.get_metadata()["axes"] if a != "layers"]
  return len(axes) > 1


def _row_zeros(variable: nnx.Variable) -> nnx.Variable:
  if not _is_matrix(variable):
    return variable.replace(jnp.zeros(variable.shape, jnp.float32))
  return _zeros_without(variable, -1)


def _column_zeros(variable: nnx.Variable) -> nnx.Variable:
  if not _is_matrix(variable):
    return variable.replace(optax.MaskedNode())
  return _zeros_without(variable, -2)


def _zeros_without(variable: nnx.Variable, axis: int) -> nnx.Variable:
  """Zeros of a variable's shape and axes but for one of them."""
  shape, axes = list(variable.shape), list(variable.get_metadata()["axes"])
  del shape[axis], axes[axis]
  return variable.replace(jnp.zeros(shape, jnp.float32), axes=tuple(axes))
