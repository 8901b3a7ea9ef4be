"""Orbax checkpoints: what a step directory holds, saving, restoring, loading.

A step holds three items: `model` (every variable of the model), `optimizer`
(moments and counters) and `meta` (JSON: task, resolved model, run config, data
state, format). Evaluation and prediction read `model` and `meta` only. Its
manifest tells damage before anything is read (see `manifest`).
"""

from argenseg_jax.checkpoint.layout import (
  DAMAGED,
  KEPT,
  CheckpointError,
  beside,
  is_step,
  kept_files,
  newest_steps,
  require_unchanged,
  step_directory,
  step_number,
  steps_below,
  text_tokenizer_path,
  workdir_of,
)
from argenseg_jax.checkpoint.load import (
  FORMAT,
  Adapters,
  Description,
  Loaded,
  describe,
  load,
  load_adapters,
  model_factory,
  refuse_other_base,
  structure_faults,
  text_tokenizer,
)
from argenseg_jax.checkpoint.manager import Checkpoints
from argenseg_jax.checkpoint.variables import (
  compare,
  read_variables,
  stored_variables,
)

__all__ = [
  "DAMAGED",
  "FORMAT",
  "KEPT",
  "Adapters",
  "CheckpointError",
  "Checkpoints",
  "Description",
  "Loaded",
  "beside",
  "compare",
  "describe",
  "is_step",
  "kept_files",
  "load",
  "load_adapters",
  "model_factory",
  "newest_steps",
  "read_variables",
  "refuse_other_base",
  "require_unchanged",
  "step_directory",
  "step_number",
  "steps_below",
  "stored_variables",
  "structure_faults",
  "text_tokenizer",
  "text_tokenizer_path",
  "workdir_of",
]
