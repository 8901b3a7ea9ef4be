"""GPU kernels in JAX's interpreter against the references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__[:2] != (0, 10):
  pytest.skip(
    "gpu_interpreter adds to the interpreter of JAX 0.10",
    allow_module_level=True,
  )

from gpu_interpreter import gpu_interpreter, races_found

from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.kernels.nearest_code import nearest_code
from argenseg_jax.kernels.scale_prediction import scale_prediction

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def interpreted():
  with gpu_interpreter():
    yield


def normal(seed, *shape, dtype="bfloat16", scale=1.0):
  x = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(x, dtype)


def loss_and_gradients(shape, implementation):
  t, d, vocab = shape
  rng = np.random.default_rng(t)
  targets = rng.integers(0, vocab, t)
  weights = rng.uniform(0.5, 2, t)
  ignored = np.arange(t) % 3 == 2
  targets[ignored], weights[ignored] = -7, 0
  cotangent = normal(2, t, dtype="float32")

  def total(hidden, head, weights):
    losses = linear_cross_entropy(
      hidden,
      head,
      jnp.asarray(targets, jnp.int32),
      weights,
      z_loss=1e-2,
      implementation=implementation,
    )
    return jnp.sum(losses * cotangent), losses

  gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
  (_, losses), (d_hidden, d_head, d_weights) = jax.jit(gradient)(
    normal(0, t, d),
    normal(1, vocab, d, scale=2 / d**0.5),
    jnp.asarray(weights, jnp.float32),
  )
  # Ignored ones have losses too, of different nothings.
  return losses, d_hidden, d_head, np.where(ignored, 0, d_weights)


def assert_close(actual, expected, tolerance):
  """Relative to the largest entry."""
  actual, expected = np.float32(actual), np.float32(expected)
  largest = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)


def test_loss_of_one_token():
  actual = loss_and_gradients((1, 64, 5), "gpu")
  assert_all_close(actual, loss_and_gradients((1, 64, 5), "reference"))


def test_loss_in_many_steps_without_races():
  # Ragged blocks, two shares of the words, and each buffer filled repeatedly.
  shape = (150, 320, 300)
  with gpu_interpreter(detect_races=True):
    actual = loss_and_gradients(shape, "gpu")
  assert not races_found()
  assert_all_close(actual, loss_and_gradients(shape, "reference"))


def assert_all_close(actual, expected):
  for a, e, tolerance in zip(
    actual, expected, (1e-6, 1.5e-2, 1.5e-2, 1e-6), strict=True
  ):
    assert_close(a, e, tolerance)


def assert_same_prediction(shape, **options):
  b, n, d, codes = shape
  inputs = (
    normal(0, b, n, d),
    # Every code twice: ties, also between blocks and shares.
    jnp.tile(normal(1, -(-codes // 2), d), (2, 1))[:codes],
    normal(2, codes, 6, dtype="float32"),
  )
  actual = scale_prediction(*inputs, implementation="gpu", **options)
  expected = scale_prediction(*inputs, implementation="reference", **options)
  np.testing.assert_array_equal(actual[0], expected[0])
  np.testing.assert_array_equal(actual[1], expected[1])
  for a, e in zip(actual[2], expected[2], strict=True):
    assert_close(a, e, 2e-6)


# Small blocks of codes, and large ones in two blocks of rows.
@pytest.mark.parametrize(
  "shape", [(1, 5, 128, 203), (2, 140, 64, 150)], ids=str
)
def test_prediction(shape):
  assert_same_prediction(shape)


def test_prediction_sampled():
  assert_same_prediction(
    (1, 9, 64, 100), key=jax.random.key(3), temperature=0.7
  )


def test_nearest():
  latent, codebook = (
    normal(seed, rows, 11, dtype="float32")
    for seed, rows in ((0, 50), (1, 300))
  )
  cost = jnp.abs(normal(2, 300, dtype="float32"))
  cost = jnp.where(jnp.arange(300) % 4 == 3, jnp.inf, cost)
  np.testing.assert_array_equal(
    nearest_code(latent, codebook, cost=cost, implementation="gpu"),
    nearest_code(latent, codebook, cost=cost, implementation="reference"),
  )


def test_nearest_takes_the_first_of_equals():
  codebook = jnp.tile(jnp.asarray([[1.0, 2.0], [3.0, -1.0]]), (70, 1))
  latent = normal(0, 21, 2, dtype="float32")
  index = nearest_code(latent, codebook, implementation="gpu")
  assert set(np.asarray(index)) <= {0, 1}


def test_kernels_refuse_what_they_cannot_multiply():
  def loss(dtype, width):
    one = jnp.ones(3)
    return linear_cross_entropy(
      jnp.ones((3, width), dtype),
      jnp.ones((5, width), dtype),
      one.astype(jnp.int32),
      one,
      implementation="gpu",
    )

  with pytest.raises(ValueError, match="bfloat16, not float32; use"):
    loss("float32", 64)
  with pytest.raises(ValueError, match="a multiple of 64, not 72; use"):
    loss("bfloat16", 72)
  with pytest.raises(ValueError, match="top_k needs all logits"):
    assert_same_prediction(
      (1, 2, 64, 8), key=jax.random.key(0), temperature=1.0, top_k=3
    )
