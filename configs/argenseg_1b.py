"""ARGenSeg on InternVL2.5-1B (Qwen2.5-0.5B): the recipe of the 8B model.

Its width of 896 divides by up to 128 parts of mesh axis fsdp.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import argenseg_8b_stage1


def get_config() -> ConfigDict:
  c = argenseg_8b_stage1.get_config()
  c.model.variant = "argenseg_1b"
  return c
