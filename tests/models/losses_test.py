"""Losses: targets put together, text and code apart, means over counts."""

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.models import losses
from argenseg_jax.scales import Scales
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET

SCALES = Scales((1, 2))  # Five codes.
N, C = IGNORE_TARGET, CODE_TARGET


def test_codes_fill_their_slots_in_order_over_several_masks():
  targets = jnp.array([[N, 3, C, C, C, C, C, 4, C, C, C, C, C, N]])
  codes = jnp.arange(10).reshape(1, 2, 5)
  resolved, index = losses.resolve_targets(targets, codes, first_code=20)
  np.testing.assert_array_equal(
    resolved[0], [N, 3, 20, 21, 22, 23, 24, 4, 25, 26, 27, 28, 29, N]
  )
  np.testing.assert_array_equal(
    index[0], [-1, -1, 0, 1, 2, 3, 4, -1, 0, 1, 2, 3, 4, -1]
  )


def loss_sums(targets, index, weight=(1.0, 1.0)):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(2, 7, 6)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32)
  sums = losses.decoder_loss(
    hidden,
    head,
    jnp.asarray(targets),
    jnp.asarray(index),
    jnp.asarray(weight, jnp.float32),
    scales=SCALES,
  )
  return sums, jax.nn.log_softmax(hidden @ head.T)


TARGETS = [[N, 3, 20, 21, 22, 23, 24], [N, N, 5, 6, N, N, N]]
INDEX = [[-1, -1, 0, 1, 2, 3, 4], [-1] * 7]


def test_text_and_code_terms_over_the_full_vocabulary():
  sums, logp = loss_sums(TARGETS, INDEX)
  text = -(logp[0, 1, 3] + logp[1, 2, 5] + logp[1, 3, 6])
  first = -logp[0, 2, 20]
  second = -sum(logp[0, 3 + i, 21 + i] for i in range(4))
  np.testing.assert_allclose(sums.text, text, rtol=1e-5)
  np.testing.assert_allclose(sums.code, [first, second], rtol=1e-5)
  np.testing.assert_array_equal(sums.text_count, 3)
  np.testing.assert_array_equal(sums.code_count, [1, 4])
  text_mean, code_mean = sums.means()
  np.testing.assert_allclose(text_mean, text / 3, rtol=1e-5)
  np.testing.assert_allclose(code_mean, (first + second) / 5, rtol=1e-5)
  np.testing.assert_allclose(sums.scale_means(), [first, second / 4], rtol=1e-5)


def test_rows_of_weight_zero_bear_no_loss():
  sums, logp = loss_sums(TARGETS, INDEX, weight=(0.0, 1.0))
  np.testing.assert_allclose(
    sums.text, -(logp[1, 2, 5] + logp[1, 3, 6]), rtol=1e-5
  )
  np.testing.assert_array_equal(sums.code, [0, 0])
  assert sums.means()[1] == 0  # No mask in the batch: no code term.


def test_seg_mask_loss_falls_towards_the_truth():
  truth = jnp.where(jnp.arange(64).reshape(1, 8, 8, 1) < 20, 1.0, -1.0)
  perfect = losses.seg_mask_loss(2 * truth, truth)
  unsure = losses.seg_mask_loss(0 * truth, truth)
  wrong = losses.seg_mask_loss(-truth, truth)
  assert perfect < 0.1 < unsure < wrong
  np.testing.assert_allclose(
    losses.seg_mask_loss(0.0 * truth, truth),
    10 * (np.log(2) + 0.3 * (1 - 21 / (32 + 20 + 1))),
    rtol=1e-5,
  )
