"""The paper's joint training of ARGenSeg-8B.

From InternVL2.5-8B and VAR's image tokenizer, as one checkpoint of `argenseg
import`: give `--config.init_from` and `--config.data.path`, and that model's
tokenizer.json as `--config.data.text_tokenizer`. The optimizer's values are the
paper's; they stand in base.py.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import base


def get_config() -> ConfigDict:
  c = base.get_config()
  # The paper allows 8,192; a request with one image and one mask takes about
  # 1,000, and rows are not packed.
  c.data.sequence_length = 2048
  c.data.threads = 16
  c.data.prefetch = 32
  c.mllm.train.save_every = 250
  return c
