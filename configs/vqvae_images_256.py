"""VAR's image tokenizer from scratch on images of 256 pixels.

It trains on the first image of each record of any layout, or on a folder of
images (`--config.data.source=image_folder`): docs/image_tokenizer.md.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import base


def get_config() -> ConfigDict:
  c = base.get_config()
  c.tasks = ("vqvae",)
  c.data.sequence_length = 0
  c.data.max_images = 0
  c.data.mask_channels = 3
  c.data.mask_intermediate_side = 0
  c.data.threads = 16
  c.vqvae.optimizer.b2 = 0.95
  c.vqvae.optimizer.warmup_steps = 1_000
  c.vqvae.train.remat = "none"
  # Convolutions are not split: every device holds the whole tokenizer.
  c.mesh.data = -1
  c.mesh.fsdp = 1
  return c
