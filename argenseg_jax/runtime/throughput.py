"""How fast a run goes: seconds a step, tokens and model FLOPs a second, MFU."""

import time

from jax.sharding import Mesh

from argenseg_jax.config import ModelConfig, RunConfig
from argenseg_jax.kernels.chips import CHIPS, name_of
from argenseg_jax.models import flops


def model_flops(config: RunConfig, task: str, model: ModelConfig) -> flops.Step:
  """FLOPs of a step as the config's rows are."""
  sizes = row_sizes(config, task)
  return flops.train_step(model, config.stage(task), task, **sizes)


def row_sizes(config: RunConfig, task: str) -> dict[str, int | bool]:
  """What `flops` wants to know of a row."""
  pack = config.data.pack if task == "mllm" else 1
  return {
    "length": config.data.sequence_length,
    "images": config.data.max_images * pack,
    "seg_masks": config.data.max_masks * pack,
    "tokenized": config.data.tokenized,
  }


class Pace:
  """Speed between one fetch of metrics and the next.

  Args:
    config: of the run.
    task: "vqvae" or "mllm".
    model: sizes.
    mesh: its devices' published peak makes FLOP/s an MFU (share of the peak
      that the model's own FLOPs take); devices without one get no MFU.
    start: step that training starts from; the first interval, which holds the
      compilation, is not reported.
  """

  def __init__(
    self, config: RunConfig, task: str, model: ModelConfig, mesh: Mesh, start
  ):
    train = config.stage(task).train
    self._tokens = train.global_batch_size * config.data.sequence_length
    self._tokens *= task == "mllm"
    self._flops = model_flops(config, task, model).model
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
