"""Fine-tuning of ARGenSeg-8B on RefCOCO, RefCOCO+ and RefCOCOg.

From a checkpoint of argenseg_8b_stage1.py or imported ARGenSeg weights
(`--config.init_from`), on the training splits as jsonl. One pass over their
126,908 objects; the paper gives no values for this stage.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import argenseg_8b_stage1


def get_config() -> ConfigDict:
  c = argenseg_8b_stage1.get_config()
  c.mllm.optimizer.learning_rate = 1e-5
  c.mllm.optimizer.warmup_steps = 30
  c.mllm.train.steps = 992
  return c
