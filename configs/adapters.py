"""Adapters on an imported model, for your own masks on one accelerator.

`--config.init_from` names the imported model, `--config.data.path` a jsonl file
(docs/own_masks.md). The base stands still in bfloat16; int8 as
`--config.lora.base` halves it. Adapters of rank 16 sit on every projection of
the language model.
The learning rate is what adapters take elsewhere; nobody has tuned it for
ARGenSeg.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import base


def get_config() -> ConfigDict:
  c = base.get_config()
  c.model.variant = ""  # That of `init_from`.
  c.lora.rank = 16
  c.lora.alpha = 32.0
  # System message, image, request and answer of one mask.
  c.data.sequence_length = 1280
  c.mllm.optimizer.learning_rate = 2e-4
  c.mllm.optimizer.warmup_steps = 30
  c.mllm.optimizer.weight_decay = 0.0
  c.mllm.train.steps = 1_000
  c.mllm.train.global_batch_size = 8
  c.mllm.train.param_dtype = "float32"  # Of the adapters.
  c.mllm.train.compute_dtype = "bfloat16"
  c.mllm.train.remat = "full"
  c.mllm.train.save_every = 200
  return c
