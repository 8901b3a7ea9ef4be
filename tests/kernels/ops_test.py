"""Every implementation of every op against its reference: value, gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.kernels.linear_cross_entropy import xla as loss_xla
from argenseg_jax.kernels.nearest_code import nearest_code
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.kernels.scale_prediction import xla as prediction_xla

FAST = ["xla", "tpu"]
DTYPES = ["float32", "bfloat16"]
# Rows, width, words or codes. The long ones make several blocks of both kinds.
LOSS_SHAPES = [(1, 8, 5), (37, 24, 203), (1100, 520, 1030), (150, 8, 9001)]
PREDICTION_SHAPES = [(1, 1, 8, 5), (3, 13, 24, 203), (2, 550, 16, 1100)]
CODE_SHAPES = [(1, 4, 1), (37, 6, 203), (1100, 8, 1100)]


@pytest.fixture(autouse=True)
def interpreted():
  """Runs TPU kernels on the CPU."""
  with pltpu.force_tpu_interpret_mode(True):
    yield


def normal(seed, *shape, dtype="float32", scale=1.0):
  x = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(x, dtype)


def loss_inputs(t, d, vocab, dtype):
  rng = np.random.default_rng(t)
  targets = jnp.asarray(rng.integers(0, vocab, t), jnp.int32)
  weights = jnp.asarray(rng.uniform(0.5, 2, t), jnp.float32)
  hidden = normal(0, t, d, dtype=dtype)
  head = normal(1, vocab, d, dtype=dtype, scale=2 / d**0.5)
  return hidden, head, targets, weights


def loss_and_gradients(inputs, **options):
  hidden, head, targets, weights = inputs
  cotangent = normal(2, len(targets))

  def total(hidden, head, weights):
    losses = linear_cross_entropy(hidden, head, targets, weights, **options)
    return jnp.sum(losses * cotangent), losses

  gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
  (_, losses), gradients = jax.jit(gradient)(hidden, head, weights)
  return losses, *gradients


def assert_close(actual, expected, dtype):
  """Within rounding of `dtype`, relative to the largest entry."""
  assert actual.dtype == expected.dtype
  actual, expected = np.float32(actual), np.float32(expected)
  largest = np.abs(expected).max()
  tolerance = {"float32": 3e-6, "bfloat16": 1.5e-2}[dtype]
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=tolerance * largest + 1e-7
  )


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
def test_loss(shape, dtype, implementation):
  inputs = loss_inputs(*shape, dtype)
  options = {"z_loss": 1e-2}
  actual = loss_and_gradients(inputs, implementation=implementation, **options)
  expected = loss_and_gradients(inputs, implementation="reference", **options)
  for a, e in zip(actual, expected, strict=True):
    assert_close(a, e, dtype)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_ignored_targets_may_be_anything(implementation):
  hidden, head, targets, weights = loss_inputs(40, 16, 70, "float32")
  ignored = jnp.arange(40) % 3 == 0
  targets = jnp.where(ignored, jnp.int32(-7), targets).at[0].set(2**30)
  weights = jnp.where(ignored, 0.0, weights)
  losses, d_hidden, d_head, _ = loss_and_gradients(
    (hidden, head, targets, weights), implementation=implementation
  )
  kept = ~np.asarray(ignored)
  assert not losses[~kept].any()
  assert not d_hidden[~kept].any()
  _, expected, d_head_expected, _ = loss_and_gradients(
    (hidden, head, targets % 70, weights), implementation="reference"
  )
  assert_close(d_hidden, expected, "float32")
  assert_close(d_head, d_head_expected, "float32")


@pytest.mark.parametrize("most_kept", [0, 2**22])
def test_blocks_of_ignored_tokens_are_left_out(most_kept, monkeypatch):
  monkeypatch.setattr(loss_xla, "_MAX_KEPT", most_kept)
  hidden, head, targets, weights = loss_inputs(700, 16, 70, "float32")
  monkeypatch.setattr(loss_xla, "block_elements", lambda _: 128 * 70)
  rng = np.random.default_rng(0)
  ignored = jnp.asarray(rng.random(700) < 0.7)
  weights = jnp.where(ignored, 0.0, weights)
  tokens = loss_xla._Tokens.of(head, targets, ~ignored)
  assert tokens.num_blocks < tokens.shape[0]
  actual = loss_and_gradients((hidden, head, targets, weights))
  expected = loss_and_gradients(
    (hidden, head, targets, weights), implementation="reference"
  )
  for a, e in zip(actual[:3], expected[:3], strict=True):
    assert_close(a, e, "float32")


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_all_targets_ignored(implementation):
  hidden, head, targets, weights = loss_inputs(20, 8, 30, "float32")
  results = loss_and_gradients(
    (hidden, head, -targets - 1, 0 * weights), implementation=implementation
  )
  for x in results[:3]:
    assert not np.asarray(x).any()


def prediction_inputs(b, n, d, codes, dtype):
  return (
    normal(0, b, n, d, dtype=dtype),
    normal(1, codes, d, dtype=dtype),
    normal(2, codes, 6),
  )


def assert_same_prediction(inputs, implementation, **options):
  codes, latents, scores = scale_prediction(
    *inputs, implementation=implementation, **options
  )
  expected = scale_prediction(*inputs, implementation="reference", **options)
  np.testing.assert_array_equal(codes, expected[0])
  np.testing.assert_array_equal(latents, np.asarray(inputs[2])[codes])
  for a, e in zip(scores, expected[2], strict=True):
    assert_close(a, e, "float32")


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PREDICTION_SHAPES, ids=str)
def test_prediction(shape, dtype, implementation):
  assert_same_prediction(prediction_inputs(*shape, dtype), implementation)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("top_k", [None, 7])
def test_prediction_sampled(top_k, implementation):
  assert_same_prediction(
    prediction_inputs(2, 41, 8, 203, "float32"),
    implementation,
    key=jax.random.key(3),
    temperature=0.7,
    top_k=top_k,
  )


def test_rows_of_later_blocks_draw_noise_of_their_own(monkeypatch):
  monkeypatch.setattr(prediction_xla, "_rows", lambda head: 8)
  assert_same_prediction(
    prediction_inputs(2, 13, 8, 57, "float32"),
    "xla",
    key=jax.random.key(3),
    temperature=1.0,
  )


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_prediction_ties_go_to_the_lowest_code(implementation):
  hidden = normal(0, 1, 20, 8)
  head = jnp.tile(normal(1, 50, 8), (5, 1))
  codes, *_ = scale_prediction(
    hidden, head, normal(2, 250, 4), implementation=implementation
  )
  assert (np.asarray(codes) < 50).all()


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_prediction_follows_the_distribution(implementation):
  head = jnp.asarray([[0.0], [1.0], [2.0], [-1.0]])
  codes, *_ = scale_prediction(
    jnp.ones((4, 500, 1)),
    head,
    jnp.zeros((4, 1)),
    key=jax.random.key(0),
    temperature=2.0,
    top_k=3,
    implementation=implementation,
  )
  shares = np.bincount(np.ravel(codes), minlength=4) / codes.size
  expected = np.exp([0, 0.5, 1, -np.inf]) / np.exp([0, 0.5, 1]).sum()
  np.testing.assert_allclose(shares, expected, atol=0.03)


def test_guidance_may_come_before_the_head():
  conditional, head, codebook = prediction_inputs(2, 9, 8, 40, "float32")
  unconditional = normal(5, 2, 9, 8)
  mixed = 1.5 * conditional - 0.5 * unconditional
  codes, *_ = scale_prediction(mixed, head, codebook)
  logits = 1.5 * conditional @ head.T - 0.5 * unconditional @ head.T
  np.testing.assert_array_equal(codes, jnp.argmax(logits, -1))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"temperature": 1.0}, "random key"),
    ({"temperature": -1.0}, "negative"),
    ({"top_k": 41}, r"1\.\.40"),
  ],
)
def test_prediction_refuses(options, message):
  with pytest.raises(ValueError, match=message):
    scale_prediction(*prediction_inputs(1, 2, 8, 40, "float32"), **options)


def test_dtypes_must_agree():
  hidden, head, targets, weights = loss_inputs(2, 8, 5, "float32")
  with pytest.raises(ValueError, match="hidden is bfloat16"):
    linear_cross_entropy(hidden.astype("bfloat16"), head, targets, weights)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_cost", [False, True])
@pytest.mark.parametrize("shape", CODE_SHAPES, ids=str)
def test_nearest(shape, with_cost, dtype, implementation):
  n, c, codes = shape
  latent, codebook = (
    normal(s, r, c, dtype=dtype) for s, r in ((0, n), (1, codes))
  )
  cost = jnp.abs(normal(2, codes)) if with_cost else None
  actual = nearest_code(
    latent, codebook, cost=cost, implementation=implementation
  )
  distances = np.square(
    np.float64(latent)[:, None] - np.float64(codebook)[None]
  ).sum(-1)
  if with_cost:
    distances += np.float64(cost)
  expected = nearest_code(
    latent, codebook, cost=cost, implementation="reference"
  )
  np.testing.assert_array_equal(expected, distances.argmin(1))
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_nearest_takes_the_first_of_equals(implementation):
  codebook = jnp.tile(jnp.asarray([[1.0, 2.0], [3.0, -1.0]]), (300, 1))
  index = nearest_code(
    normal(0, 21, 2), codebook, implementation=implementation
  )
  assert set(np.asarray(index)) <= {0, 1}


def test_tpu_kernels_do_not_race_nor_read_uninitialized_memory():
  # Two blocks of codes, the second one ragged.
  strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(strict):
    inputs = loss_inputs(9, 8, 1030, "float32")
    actual = loss_and_gradients(inputs, implementation="tpu")
    expected = loss_and_gradients(inputs, implementation="reference")
    for a, e in zip(actual, expected, strict=True):
      assert_close(a, e, "float32")
    assert_same_prediction(prediction_inputs(1, 9, 8, 1030, "float32"), "tpu")
    latent, codebook = normal(0, 9, 4), normal(1, 1030, 4)
    np.testing.assert_array_equal(
      nearest_code(latent, codebook, implementation="tpu"),
      nearest_code(latent, codebook, implementation="reference"),
    )
  assert not interpret_pallas_call.races.races_found
