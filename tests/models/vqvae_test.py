"""The image tokenizer: shapes, prefixes, padding, gradients, messages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.model_config import VQVAEConfig
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


def build(**types):
  """An image tokenizer with random parameters, quicker than initializing."""
  made = construct.abstract(
    lambda: VQVAE(CONFIG, rngs=construct.Rngs(0), **types)
  )
  graph, params, rest = nnx.split(made, nnx.Param, ...)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10
    center = 1.0 if path[-1] == "scale" else 0.0
    values = rng.normal(center, fan_in**-0.5, leaf.shape)
    return leaf.replace(jnp.asarray(values, leaf.dtype))

  flat = [(path, draw(path, leaf)) for path, leaf in nnx.to_flat_state(params)]
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
  return nnx.merge(graph, nnx.from_flat_state(flat), zeros)


@pytest.fixture(scope="module")
def vqvae():
  return build()


@pytest.fixture(scope="module")
def run(vqvae):
  """Calls a method of the fixture under jit."""
  graph, state = nnx.split(vqvae)

  @functools.partial(jax.jit, static_argnums=0)
  def call(name, state, x):
    return getattr(nnx.merge(graph, state), name)(x)

  return lambda name, x, module=None: call(
    name, state if module is None else nnx.state(module), x
  )


@pytest.fixture(scope="module")
def images():
  return jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)


def test_encode_and_decode_shapes(run, images):
  codes = run("encode", images)
  assert codes.shape == (2, 21)
  assert codes.dtype == jnp.int32
  assert run("decode", codes).shape == images.shape


def test_decoding_is_clamped_and_training_is_not(vqvae, run, images):
  loud = nnx.clone(vqvae)
  loud.decoder.conv_out.bias[...] = jnp.array([3.0, -3.0, 0.0])
  codes = run("encode", images, loud)
  decoded = run("decode", codes, loud)
  assert jnp.abs(decoded).max() == 1
  result = run("__call__", images, loud)
  assert result.latent.shape == (2, 4, 4, 4)
  assert jnp.abs(result.images).max() > 1
  np.testing.assert_array_equal(result.codes, codes)
  np.testing.assert_allclose(jnp.clip(result.images, -1, 1), decoded, atol=1e-5)


def test_last_prefix_is_the_whole_decode(vqvae, run, images):
  codes = run("encode", images)
  prefixes = run("decode_prefixes", codes)
  assert prefixes.shape == (2, 3, 16, 16, 3)
  np.testing.assert_allclose(prefixes[:, -1], run("decode", codes), atol=1e-5)
  first = run("decode_latent", vqvae.quantizer.sum_scales(codes, 1))
  np.testing.assert_allclose(prefixes[:, 0], jnp.clip(first, -1, 1), atol=1e-5)


def test_without_quantization_it_is_an_autoencoder(vqvae, run, images):
  result = jax.jit(lambda x: vqvae(x, quantize=False))(images)
  want = run("decode_latent", run("encode_latent", images))
  np.testing.assert_allclose(result.images, want, atol=1e-5)
  assert result.codes is None
  np.testing.assert_array_equal(result.vq_loss, [0, 0])


def test_every_parameter_gets_a_gradient(vqvae, images):
  graph, params, rest = nnx.split(vqvae, nnx.Param, ...)

  def loss(params):
    result = nnx.merge(graph, params, rest)(images)
    return jnp.mean((result.images - images) ** 2) + result.vq_loss.mean()

  grads = jax.jit(jax.grad(loss))(params)
  # Three scales leave one of the four phis unused.
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
  vqvae = build(dtype=jnp.bfloat16)
  result = nnx.eval_shape(lambda: vqvae(images))
  assert result.images.dtype == result.latent.dtype == jnp.float32


def test_every_parameter_names_its_axes(vqvae):
  for path, leaf in nnx.to_flat_state(nnx.state(vqvae, nnx.Param)):
    assert len(leaf.get_metadata("axes")) == leaf.ndim, path


def test_disagreeing_sides_are_named():
  config = dataclasses.replace(CONFIG, image_side=32)
  with pytest.raises(ValueError, match=r"vqvae\.image_side is 32"):
    VQVAE(config, rngs=construct.Rngs(0))
