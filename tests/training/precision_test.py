"""bfloat16 weights learn what float32 weights learn; averages are float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_rows
from flax import nnx

from argenseg_jax import sharding
from argenseg_jax.config import MeshConfig
from argenseg_jax.config_parsing import replace, run_config
from argenseg_jax.configs import tiny
from argenseg_jax.data import pipeline
from argenseg_jax.training import state as train_state
from argenseg_jax.training.objectives import mllm_loss
from argenseg_jax.training.optimizer import (
  apply_updates,
  init_moments,
  make_optimizer,
  round_at_random,
)
from argenseg_jax.training.step import make_train_step, update_average
from argenseg_jax.training.tasks import DECODER

STEPS = 1000


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


class Weights(nnx.Module):
  """A few hundred of them, all 1."""

  def __init__(self, dtype):
    self.weights = nnx.Param(jnp.ones(512, dtype), axes=(None,))


def settings(**changes):
  values = tiny.get_config()
  values.data.path = "unused"
  plain = {
    "mllm.train.steps": STEPS,
    "mllm.optimizer.name": "adamw",
    "mllm.optimizer.schedule": "constant",
    "mllm.optimizer.warmup_steps": 0,
    "mllm.optimizer.weight_decay": 0.0,
    "mllm.optimizer.frozen": [],
  }
  return replace(run_config(values), plain | changes)


def test_a_number_goes_to_its_neighbors_and_stays_on_average():
  x = jnp.asarray([1.001, -1.001, 1.0, 3e-40, jnp.inf, -jnp.inf, jnp.nan])
  keys = jax.random.split(jax.random.key(0), 4000)
  found = jax.vmap(lambda key: round_at_random(x, key))(keys)
  found = np.asarray(found, np.float32)
  step = 2.0**-7
  assert set(found[:, 0]) == {1.0, 1.0 + step}
  assert set(found[:, 1]) == {-1.0, -1.0 - step}
  np.testing.assert_allclose(found[:, 0].mean(), 1.001, atol=2e-4)
  np.testing.assert_allclose(found[:, 1].mean(), -1.001, atol=2e-4)
  assert (found[:, 2] == 1.0).all()
  assert (found[:, 4] == np.inf).all()
  assert (found[:, 5] == -np.inf).all()
  assert np.isnan(found[:, 6]).all()


def test_weights_move_as_in_float32_where_rounding_would_hold_them():
  """At the paper's rate an update of a weight of 1 is below half of its last
  bit."""
  config = settings(**{"mllm.optimizer.learning_rate": 4e-5}).mllm

  def train(dtype):
    params = nnx.state(Weights(dtype))
    optimizer = make_optimizer(config.optimizer, STEPS, params)
    grads = jax.tree.map(lambda p: jnp.ones_like(p, jnp.float32), params)

    def step(carry, key):
      params, moments = carry
      updates, moments = optimizer.update(grads, moments, params)
      return (apply_updates(params, updates, key), moments), None

    start = params, init_moments(optimizer, params)
    keys = jax.random.split(jax.random.key(1), STEPS)
    (params, _), _ = jax.lax.scan(step, start, keys)
    assert params["weights"].dtype == dtype
    return np.asarray(params["weights"][...], np.float64)

  assert jnp.asarray(1.0, jnp.bfloat16) - jnp.asarray(4e-5, jnp.bfloat16) == 1.0
  exact, half = train(jnp.float32), train(jnp.bfloat16)
  np.testing.assert_allclose(exact, 1 - STEPS * 4e-5, rtol=1e-4)
  np.testing.assert_allclose(half.mean(), exact.mean(), atol=2e-3)


def test_the_average_of_bfloat16_weights_is_float32_and_follows():
  config = settings(**{"mllm.optimizer.ema_decay": 0.999}).mllm
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  described = train_state.describe(
    *nnx.split(Weights(jnp.bfloat16)), config, num_codes=4, mesh=mesh
  )
  state = described.begin(nnx.state(Weights(jnp.bfloat16)))
  assert state.params["weights"].dtype == jnp.bfloat16
  assert described.state.average["weights"].dtype == jnp.float32
  # What is saved and evaluated.
  assert state.variables["weights"].dtype == jnp.float32
  assert state.counters[3]["weights"].dtype == jnp.bfloat16
  target = jax.tree.map(lambda p: p * 1.125, state.params)

  def move(step, average):
    return update_average(average, target, step + 10**6, 0.999)

  average = jax.lax.fori_loop(0, STEPS, move, state.average)
  np.testing.assert_allclose(
    average["weights"][...], 1.125 - 0.125 * 0.999**STEPS, rtol=1e-4
  )


def decoder_losses(rows, dtype=jnp.float32, turns=1):
  """Of the first and the last ten of `STEPS` steps over two batches, at a rate
  that bfloat16 would swallow; and of the averaged weights at the end."""
  config = settings(
    **{
      "mllm.train.global_batch_size": 2,
      "mllm.train.accumulate_steps": turns,
      "mllm.optimizer.learning_rate": 3e-4,
      "mllm.optimizer.ema_decay": 0.99,
      "mllm.optimizer.frozen": ["vqvae"],
      "loss.drop_scale_inputs": 0.0,
    }
  )
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  graph, variables = nnx.split(tiny_rows.model())
  variables = jax.tree.map(
    lambda x: jnp.array(x, dtype if x.dtype == jnp.float32 else x.dtype),
    variables,
  )
  described = train_state.describe(
    graph, variables, config.mllm, num_codes=11, mesh=mesh
  )
  state = described.begin(variables)
  step = make_train_step(
    described.graph, described.optimizer, config, DECODER, mesh=mesh
  )
  step = jax.jit(step)
  iterator = pipeline.TrainIterator(rows, 2)
  batches = [sharding.put_batch(next(iterator), mesh) for _ in range(2)]
  iterator.close()
  losses = []
  for number in range(STEPS):
    state, metrics = step(state, batches[number % 2])
    losses.append(metrics["loss"])
  losses = np.asarray(jax.device_get(losses))

  @jax.jit
  def loss(average, batch):
    model = nnx.merge(graph, average)
    return mllm_loss(model, batch, config.loss)[0]

  average = state.variables
  of_average = np.mean([loss(average, batch) for batch in batches])
  return losses[:10].mean(), losses[-10:].mean(), of_average


@pytest.mark.long
def test_a_decoder_learns_what_one_in_plain_float32_does(tmp_path):
  """In bfloat16, with two turns of accumulation, and on average."""
  rows = tiny_rows.write("jsonl", tmp_path)
  first, last, average = decoder_losses(rows)
  half = decoder_losses(rows, jnp.bfloat16)
  turns = decoder_losses(rows, turns=2)
  for name, found in (
    ("float32", (first, last, average)),
    ("bfloat16", half),
    ("float32 in two turns", turns),
  ):
    print(name, *(f"{loss:.4f}" for loss in found))
  gained = first - last
  assert gained > 8
  assert first - average > 0.9 * gained  # It lags behind by 100 steps.
  for found, most in ((half, 0.05), (turns, 0.001)):
    assert abs(found[1] - last) < most * gained
    assert abs(found[2] - average) < most * gained
