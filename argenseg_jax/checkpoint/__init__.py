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
  is_step,
  kept_files,
  step_directory,
  text_tokenizer_path,
)
from argenseg_jax.checkpoint.load import (
  FORMAT,
  Adapters,
  Description,
  Loaded,
  compare,
  describe,
  load,
  load_adapters,
  model_factory,
  read_variables,
  refuse_other_base,
  stored_variables,
  text_tokenizer,
)
from argenseg_jax.checkpoint.manager import Checkpoints

__all__ = [
  "DAMAGED",
  "FORMAT",
  "KEPT",
  "Adapters",
  "CheckpointError",
  "Checkpoints",
  "Description",
  "Loaded",
  "compare",
  "describe",
  "is_step",
  "kept_files",
  "load",
  "load_adapters",
  "model_factory",
  "read_variables",
  "refuse_other_base",
  "step_directory",
  "stored_variables",
  "text_tokenizer",
  "text_tokenizer_path",
]
