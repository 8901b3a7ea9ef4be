"""How fast a run goes: seconds a step, tokens and model FLOPs a second, MFU."""

import time

from jax.sharding import Mesh

from argenseg_jax.kernels.chips import CHIPS, name_of


class Pace:
  """Speed between one fetch of metrics and the next.

  Args:
    flops: the model's own FLOPs of a step.
    tokens: positions of a step's sequences; 0: it reads no text.
    mesh: its devices' published peak makes FLOP/s an MFU (share of the peak
      that the model's own FLOPs take); devices without one get no MFU.
    start: step that training starts from; the first interval, which holds the
      compilation, is not reported.
  """

  def __init__(self, *, flops: float, tokens: int, mesh: Mesh, start: int):
    self._tokens = tokens
    self._flops = flops
    chip = CHIPS.get(name_of(mesh.devices.flat[0].device_kind) or "")
    self._peak = chip and chip.flops / chip.devices * mesh.size
    self._step, self._time = start, None

  def __call__(self, step: int) -> dict[str, float]:
    """Metrics of the steps since the last call."""
    now, before = time.monotonic(), self._time
    steps, self._step, self._time = step - self._step, step, now
    if before is None or not steps:
      return {}
    seconds = (now - before) / steps
    values = {
      "step_seconds": seconds,
      "model_tflops_per_second": self._flops / seconds / 1e12,
    }
    if self._tokens:
      values["tokens_per_second"] = self._tokens / seconds
    if self._peak:
      values["mfu"] = self._flops / seconds / self._peak
    return values

  def pause(self) -> None:
    """Leaves out the interval in which something else ran."""
    self._time = None
