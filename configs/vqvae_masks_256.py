"""VAR's image tokenizer from scratch on masks of 256 pixels.

It trains on the masks of any layout, or on a folder of mask images
(`--config.data.source=image_folder`): docs/image_tokenizer.md.

The recipe of tiny.py at full size: a few steps without the quantizer, a
codebook that starts on the data, revival of dead codes.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import vqvae_images_256


def get_config() -> ConfigDict:
  c = vqvae_images_256.get_config()
  c.data.mask_channels = 1
  c.data.mask_intermediate_side = 512
  c.vqvae.train.steps = 20_000
  c.tokenizer_training.reconstruction = "bce_dice"
  c.tokenizer_training.warm_start_steps = 500
  c.tokenizer_training.kmeans_iterations = 10
  c.tokenizer_training.revive_every = 100
  c.tokenizer_training.revive_until = 10_000
  return c
