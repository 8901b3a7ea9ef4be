"""What a checkpoint is judged by when only the best are kept."""

import jax
import numpy as np
from jaxtyping import Array, Float


class Scores:
  """Collects what happened since the last save."""

  def __init__(self) -> None:
    self._losses: list[Float[Array, ""]] = []
    self._ciou: tuple[int, float] | None = None  # Step and value.

  def add_loss(self, loss: Float[Array, ""]) -> None:
    """Of a step; it is not waited for."""
    self._losses.append(loss)

  def add_ciou(self, step: int, ciou: float | None) -> None:
    """Of an evaluation at a step, if it measured one."""
    self._ciou = None if ciou is None else (step, ciou)

  def __call__(self, by: str, step: int) -> float | None:
    """The score of a checkpoint that is saved now; higher is better.

    Args:
      by: "loss" (the mean since the last save) or "ciou".
      step: of the checkpoint; an evaluation of another step is not its score.

    Returns:
      None where nothing was measured, or a loss was not finite: such a
      checkpoint is never among the best.
    """
    losses, self._losses = jax.device_get(self._losses), []
    if by == "ciou":
      measured_at, ciou = self._ciou or (-1, 0.0)
      return ciou if measured_at == step else None
    if not losses or not np.all(np.isfinite(losses)):
      return None
    return -float(np.mean(losses))
