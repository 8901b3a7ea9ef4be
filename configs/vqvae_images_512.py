"""VAR's image tokenizer from scratch on images of 512 pixels: 2,240 codes."""

from ml_collections import ConfigDict

from argenseg_jax.configs import vqvae_images_256


def get_config() -> ConfigDict:
  c = vqvae_images_256.get_config()
  c.model.variant = "argenseg_8b_512"
  c.data.mask_side = 512
  return c
