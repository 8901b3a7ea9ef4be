"""What a checkpoint is judged by when only the best are kept."""

import jax
import numpy as np
from jaxtyping import Array, Float


class Scores:
  """Collects what happened since the last save."""

  def __init__(self) -> None:
    self._losses: list[Float[Array, ""]] = []
    self.ciou: float | None = None  # Of an evaluation, if there was one.

  def add_loss(self, loss: Float[Array, ""]) -> None:
    """Of a step; it is not waited for."""
    self._losses.append(loss)

  def __call__(self, by: str) -> float | None:
    """The score of a checkpoint that is saved now; higher is better.

    Args:
      by: "loss" or "ciou".

    Returns:
      None where nothing was measured, or a loss was not finite: such a
      checkpoint is never among the best.
    """
    losses, self._losses = jax.device_get(self._losses), []
    ciou, self.ciou = self.ciou, None
    if by == "ciou":
      return ciou
    if not losses or not np.all(np.isfinite(losses)):
      return None
    return -float(np.mean(losses))
