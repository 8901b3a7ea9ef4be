"""The quantizer against a slow one written with loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.model_config import VQVAEConfig
from argenseg_jax.models.vq import Quantizer

CONFIG = VQVAEConfig(
  image_side=24,
  scales=(1, 2, 4, 6),
  latent_channels=3,
  num_codes=7,
  num_phis=4,
)


@pytest.fixture
def quantizer():
  made = Quantizer(CONFIG, rngs=construct.Rngs(0))
  made.phi_bias[...] = jax.random.normal(jax.random.key(1), (4, 3)) * 0.1
  return made


@pytest.fixture
def latent():
  return jax.random.normal(jax.random.key(2), (2, 6, 6, 3))


@pytest.fixture
def codes():
  return jax.random.randint(jax.random.key(3), (2, 57), 0, 7, jnp.int32)


def slow_area(x, side):
  """Adaptive average pooling, bin by bin."""
  full = x.shape[0]
  out = np.zeros((side, side, x.shape[2]))
  for i in range(side):
    for j in range(side):
      rows = slice(i * full // side, -((-(i + 1) * full) // side))
      columns = slice(j * full // side, -((-(j + 1) * full) // side))
      out[i, j] = x[rows, columns].mean((0, 1))
  return out


def slow_bicubic(x, side):
  method = jax.image.ResizeMethod.CUBIC_PYTORCH
  shape = (side, side, x.shape[2])
  return np.asarray(
    jax.image.resize(jnp.asarray(x, "float32"), shape, method, antialias=False),
    np.float64,
  )


def slow_phi(quantizer, x, index):
  kernel = np.asarray(quantizer.phi_kernel[...][index], np.float64)
  bias = np.asarray(quantizer.phi_bias[...][index], np.float64)
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  y = np.zeros_like(x)
  for i in range(x.shape[0]):
    for j in range(x.shape[1]):
      patch = padded[i : i + 3, j : j + 3]
      y[i, j] = np.einsum("ijc,ijco->o", patch, kernel) + bias
  return 0.5 * x + 0.5 * y


def slow_quantize(quantizer, latent):
  """Codes, partial latents and next-scale inputs of one latent [h w c]."""
  sides = CONFIG.scales
  codebook = np.asarray(quantizer.codebook[...], np.float64)
  residual = np.asarray(latent, np.float64)
  partial = np.zeros_like(residual)
  all_codes, partials, inputs = [], [], []
  for k, side in enumerate(sides):
    pooled = slow_area(residual, side)
    token_map = np.zeros((side, side), int)
    for i, j in np.ndindex(side, side):
      token_map[i, j] = np.argmin(((pooled[i, j] - codebook) ** 2).sum(-1))
    rows = codebook[token_map]
    rows = slow_bicubic(rows, sides[-1]) if side != sides[-1] else rows
    added = slow_phi(quantizer, rows, quantizer.scales.phi_index[k])
    partial = partial + added
    residual = residual - added
    all_codes.append(token_map.reshape(-1))
    partials.append(partial)
    if k + 1 < len(sides):
      inputs.append(slow_area(partial, sides[k + 1]).reshape(-1, 3))
  return np.concatenate(all_codes), np.stack(partials), np.concatenate(inputs)


def test_agrees_with_slow_loops(quantizer, latent):
  codes = quantizer.encode(latent)
  prefixes = quantizer.prefixes(codes)
  inputs = quantizer.scale_inputs(codes)
  quantized = quantizer(latent)
  assert codes.dtype == jnp.int32
  np.testing.assert_array_equal(quantized.codes, codes)
  losses = []
  for row in range(2):
    want = slow_quantize(quantizer, latent[row])
    np.testing.assert_array_equal(codes[row], want[0])
    np.testing.assert_allclose(prefixes[row], want[1], atol=1e-5)
    np.testing.assert_allclose(inputs[row], want[2], atol=1e-5)
    losses.append(((want[1] - np.asarray(latent[row])) ** 2).mean())
  losses = 1.25 * np.array(losses)
  np.testing.assert_allclose(quantized.loss, losses, rtol=1e-5)
  np.testing.assert_allclose(quantized.latent, prefixes[:, -1], atol=1e-5)


def test_sum_of_scales_is_last_prefix_and_linear_in_scales(quantizer, codes):
  prefixes = quantizer.prefixes(codes)
  for n in range(1, 5):
    np.testing.assert_allclose(
      quantizer.sum_scales(codes, n), prefixes[:, n - 1], atol=1e-6
    )
  np.testing.assert_array_equal(
    quantizer.sum_scales(codes), quantizer.sum_scales(codes, 4)
  )
  zeros = jnp.zeros((2, 6, 6, 3))
  parts = quantizer.scales.split(codes)
  alone = [quantizer.add_scale(zeros, part, k) for k, part in enumerate(parts)]
  np.testing.assert_allclose(sum(alone), prefixes[:, -1], atol=1e-5)


def test_scale_inputs_are_the_steps_of_generation(quantizer, codes):
  partial, steps = jnp.zeros((2, 6, 6, 3)), []
  for k, part in enumerate(quantizer.scales.split(codes)[:-1]):
    partial = quantizer.add_scale(partial, part, k)
    steps.append(quantizer.next_input(partial, k))
  inputs = quantizer.scale_inputs(codes)
  assert inputs.shape == (2, 56, 3)
  assert inputs.dtype == jnp.float32
  np.testing.assert_array_equal(inputs, jnp.concatenate(steps, 1))


def test_single_scale_has_no_inputs():
  config = dataclasses.replace(CONFIG, scales=(6,))
  quantizer = Quantizer(config, rngs=construct.Rngs(0))
  codes = jnp.zeros((2, 36), jnp.int32)
  assert quantizer.scale_inputs(codes).shape == (2, 0, 3)


def test_straight_through_gradient_is_the_identity(quantizer, latent):
  weights = jax.random.normal(jax.random.key(4), latent.shape)
  grad = jax.grad(lambda f: jnp.sum(quantizer(f).latent * weights))(latent)
  np.testing.assert_array_equal(grad, weights)


def test_loss_gradients(quantizer, latent):
  graph, params, rest = nnx.split(quantizer, nnx.Param, ...)

  def loss(params, f):
    return nnx.merge(graph, params, rest)(f).loss.mean()

  grads, grad_latent = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, latent)
  prefixes = quantizer.prefixes(quantizer.encode(latent))
  pull = jnp.mean(latent[:, None] - prefixes, 1) * 2 * 0.25 / latent.size
  np.testing.assert_allclose(grad_latent, pull, atol=1e-7)

  # Codes are fixed, so the loss is a polynomial of codebook and phis.
  codes = quantizer.encode(latent)

  @jax.jit
  def push(params):
    partials = nnx.merge(graph, params, rest).prefixes(codes)
    return jnp.mean((partials - latent[:, None]) ** 2)

  for name in ("codebook", "phi_kernel", "phi_bias"):
    value = params[name][...]
    direction = jax.random.normal(jax.random.key(5), value.shape)
    sides = []
    for step in (1e-2, -1e-2):
      moved = jax.tree.map(lambda x: x, params)
      moved[name][...] = value + step * direction
      sides.append(push(moved))
    slope = (sides[0] - sides[1]) / 2e-2
    along = jnp.sum(grads[name][...] * direction)
    np.testing.assert_allclose(along, slope, rtol=2e-3, atol=1e-5)


def test_first_of_equal_codes_wins(quantizer, latent):
  quantizer.codebook[...] = jnp.tile(quantizer.codebook[...][:1], (7, 1))
  assert not quantizer.encode(latent).any()


def test_assignment_cost_moves_codes_and_is_no_parameter(quantizer, latent):
  before = quantizer.encode(latent)
  assert "assignment_cost" not in nnx.state(quantizer, nnx.Param)
  cost = jnp.zeros((4, 7)).at[1, 1:].set(1e6)
  quantizer.assignment_cost[...] = cost
  first, second, *_ = quantizer.scales.split(quantizer.encode(latent))
  np.testing.assert_array_equal(first, quantizer.scales.split(before)[0])
  assert not second.any()


def test_vectors_are_what_the_codes_stand_for(quantizer, latent):
  quantized = quantizer(latent)
  distances = jnp.sum(
    (quantized.vectors[:, :, None] - quantizer.codebook[...]) ** 2, -1
  )
  np.testing.assert_array_equal(jnp.argmin(distances, -1), quantized.codes)
  grads = jax.grad(lambda f: jnp.sum(quantizer(f).vectors))(latent)
  assert not grads.any()


def test_count_codes(quantizer, codes):
  counts = quantizer.count_codes(codes)
  assert counts.shape == (4, 7)
  parts = quantizer.scales.split(np.asarray(codes))
  for k, code in np.ndindex(4, 7):
    assert counts[k, code] == (parts[k] == code).sum()
  valid = jnp.arange(len(codes)) < 1
  np.testing.assert_array_equal(
    quantizer.count_codes(codes, valid), quantizer.count_codes(codes[:1])
  )


def test_computes_in_float32_from_bfloat16_parameters(latent):
  half = construct.abstract(
    lambda: Quantizer(CONFIG, rngs=construct.Rngs(0), param_dtype=jnp.bfloat16)
  )
  assert half.codebook.dtype == jnp.bfloat16
  graph, state = nnx.split(half)
  quantized, inputs = jax.eval_shape(
    lambda state, x: (
      nnx.merge(graph, state)(x),
      nnx.merge(graph, state).scale_inputs(jnp.zeros((2, 57), jnp.int32)),
    ),
    state,
    latent.astype(jnp.bfloat16),
  )
  assert quantized.latent.dtype == quantized.loss.dtype == jnp.float32
  assert inputs.dtype == jnp.float32
