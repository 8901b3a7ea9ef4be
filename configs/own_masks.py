"""The small model on your own masks: an image tokenizer, then the decoder.

`--config.data.path` names a jsonl file in the layout of docs/own_masks.md.
Evaluation measures the training images themselves: pass another file to
`argenseg eval` for unseen ones.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import tiny


def get_config() -> ConfigDict:
  c = tiny.get_config()
  c.data.source = "jsonl"
  c.data.answer = "<mask>"
  c.data.sequence_length = 256
  c.data.resize = "pillow"
  c.data.warmup_steps = 0
  c.vqvae.train.steps = 600
  c.mllm.train.steps = 1000
  c.mllm.train.eval_every = 250
  c.eval.splits = ("train",)
  return c
