"""The image tokenizer: shapes, prefixes, padding, gradients, messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax.config import VQVAEConfig
from argenseg_jax.models.vqvae import VQVAE

CONFIG = VQVAEConfig(
  image_side=16,
  scales=(1, 2, 4),
  width=8,
  width_multipliers=(1, 1, 2),
  blocks_per_level=1,
  latent_channels=4,
  num_codes=16,
  norm_groups=4,
)


@pytest.fixture(scope="module")
def vqvae():
  return VQVAE(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def images():
  return jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)


def test_encode_and_decode_shapes(vqvae, images):
  assert vqvae.encode_latent(images).shape == (2, 4, 4, 4)
  codes = vqvae.encode(images)
  assert codes.shape == (2, 21)
  decoded = vqvae.decode(codes)
  assert decoded.shape == images.shape
  assert jnp.abs(decoded).max() <= 1


def test_decoding_is_clamped_and_training_is_not(vqvae, images):
  loud = nnx.clone(vqvae)
  loud.decoder.conv_out.bias[...] = jnp.array([3.0, -3.0, 0.0])
  codes = loud.encode(images)
  decoded = loud.decode(codes)
  assert jnp.abs(decoded).max() == 1
  result = loud(images)
  assert jnp.abs(result.images).max() > 1
  np.testing.assert_array_equal(result.codes, codes)
  np.testing.assert_allclose(jnp.clip(result.images, -1, 1), decoded, atol=1e-5)


def test_last_prefix_is_the_whole_decode(vqvae, images):
  codes = vqvae.encode(images)
  prefixes = vqvae.decode_prefixes(codes)
  assert prefixes.shape == (2, 3, 16, 16, 3)
  np.testing.assert_allclose(prefixes[:, -1], vqvae.decode(codes), atol=1e-5)
  first = vqvae.decode_latent(vqvae.quantizer.sum_scales(codes, 1))
  np.testing.assert_allclose(prefixes[:, 0], jnp.clip(first, -1, 1), atol=1e-5)


def test_without_quantisation_it_is_an_autoencoder(vqvae, images):
  result = vqvae(images, quantize=False)
  want = vqvae.decode_latent(vqvae.encode_latent(images))
  np.testing.assert_array_equal(result.images, want)
  assert result.codes is None
  assert result.vq_loss == 0


def test_every_parameter_gets_a_gradient(vqvae, images):
  graph, params, rest = nnx.split(vqvae, nnx.Param, ...)

  @jax.jit
  def loss(params):
    result = nnx.merge(graph, params, rest)(images)
    return jnp.mean((result.images - images) ** 2) + result.vq_loss

  grads = jax.grad(loss)(params)
  # Three scales take phis 0, 1 (the nearer of the middle two) and 3.
  used = sorted(set(vqvae.quantizer.scales.phi_index))
  for path, grad in nnx.to_flat_state(grads):
    value = grad[...]
    assert jnp.isfinite(value).all(), path
    if path[-1] in ("phi_kernel", "phi_bias"):
      value = value[jnp.array(used)]
    assert value.any(), path


def test_halving_pads_bottom_and_right(vqvae):
  conv = vqvae.encoder.levels[0].resample
  x = jax.random.normal(jax.random.key(2), (1, 6, 6, 8))
  kernel, bias = conv.kernel[...], conv.bias[...]
  y = conv(x)
  assert y.shape == (1, 3, 3, 8)
  corner = jnp.einsum("ijc,ijco->o", x[0, :3, :3], kernel) + bias
  np.testing.assert_allclose(y[0, 0, 0], corner, rtol=1e-4, atol=1e-5)
  last = jnp.einsum("ijc,ijco->o", x[0, 4:, 4:], kernel[:2, :2]) + bias
  np.testing.assert_allclose(y[0, 2, 2], last, rtol=1e-4, atol=1e-5)


def test_attention_only_at_the_lowest_resolution(vqvae):
  assert [len(v.attentions) for v in vqvae.encoder.levels] == [0, 0, 1]
  assert [len(v.attentions) for v in vqvae.decoder.levels] == [0, 0, 2]


def test_bfloat16_activations_leave_latent_and_image_float32(images):
  vqvae = VQVAE(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  result = vqvae(images)
  assert result.images.dtype == result.latent.dtype == jnp.float32


def test_every_parameter_names_its_axes(vqvae):
  for path, leaf in nnx.to_flat_state(nnx.state(vqvae, nnx.Param)):
    assert len(leaf.get_metadata("axes")) == leaf.ndim, path


def test_disagreeing_sides_are_named():
  config = dataclasses.replace(CONFIG, image_side=32)
  with pytest.raises(ValueError, match=r"vqvae\.image_side is 32"):
    VQVAE(config, rngs=nnx.Rngs(0))
