"""Sampled answers are scored as they were drawn, and rewards move the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_rl import (
  CODES,
  IDS,
  ROWS,
  WORDS,
  make_batch,
  make_config,
  make_model,
  sampled,
)

from argenseg_jax import checkpoint, sharding
from argenseg_jax.config import ConfigError, MeshConfig, RunConfig
from argenseg_jax.models.argenseg import normalize_images
from argenseg_jax.models.llm import KVCache
from argenseg_jax.training import initialize, rewards, rl, rollouts
from argenseg_jax.training.optimizer import trainable_filter
from argenseg_jax.training.state import TrainState, describe
from argenseg_jax.training.step import make_train_step
from argenseg_jax.training.tasks import TASKS
from argenseg_jax.types import IGNORE_TARGET

WANTED = 17  # The word that the bandit pays for.


@pytest.fixture(autouse=True)
def _standard_promotion(monkeypatch):
  monkeypatch.setitem(rewards.REWARDS, "word", _word)
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


def _word(answered):
  """One word is worth 1 where a mask is due; elsewhere all are worth the
  same."""
  return jnp.where(answered.is_due, answered.tokens[:, 0] == WANTED, 0.7)


def test_codes_are_scored_as_they_were_drawn():
  rollout, drawn, scored = sampled(make_config())
  has_mask = np.asarray(rollout.has_mask)
  assert 5 < has_mask.sum() < 60
  drawn = np.asarray(drawn).reshape(ROWS, -1, CODES)
  np.testing.assert_allclose(
    scored.codes, np.where(has_mask[..., None], drawn, 0), atol=1e-4
  )


@pytest.mark.long
def test_given_text_leaves_codes_to_draw():
  config = make_config(**{"rl.given_text": True})
  rollout, drawn, scored = sampled(config)
  assert rollout.has_mask.all()
  due = ROWS - 2
  np.testing.assert_allclose(
    scored.codes[:due],
    drawn.reshape(scored.codes.shape)[:due],
    atol=1e-4,
  )
  assert scored.text.shape == (ROWS, 8, 0)
  np.testing.assert_array_equal(rollout.weight, [1, 1, 1, 1, 1, 0, 0, 0])
  # All that row 0 is given: its prompt, a word and `<ge_start>`.
  np.testing.assert_array_equal(
    rollout.lead[0][rollout.lead_valid[0]],
    [*make_batch().tokens[0, :8], IDS.ge_start],
  )


@jax.jit
def _one_by_one(images, lead, valid, is_answer, said):
  """Log-probabilities of words, fed to a cache one by one."""
  model = make_model()
  b, t = lead.shape
  x = model.prompt_embeddings(
    lead, model.vision_embeddings(normalize_images(images))
  )
  hidden, cache = model.llm.extend(
    x,
    KVCache.empty(model.config.llm, b, t + WORDS),
    positions=jnp.maximum(jnp.cumsum(valid, 1) - 1, 0),
    valid=valid,
    reach=model.reach(lead, ~is_answer),
  )
  last, found = hidden[:, -1], []
  for i in range(WORDS):
    logits = jax.nn.log_softmax(model.llm.logits(last))
    found.append(jnp.take_along_axis(logits, said[:, i : i + 1], 1)[:, 0])
    hidden, cache = model.llm.extend(
      model.llm.embed(said[:, i : i + 1]),
      cache,
      positions=jnp.sum(valid, 1, keepdims=True) + i,
      valid=jnp.ones((b, 1), bool),
    )
    last = hidden[:, 0]
  return jnp.stack(found, 1)


def test_words_are_scored_as_they_were_drawn():
  rollout, _, scored = sampled(make_config())
  g = rollout.codes.shape[1]
  said, drawn = rl._words(make_model(), rollout)
  assert 0 < np.asarray(drawn[..., -1]).mean() < 1  # Some ended before.
  expected = _one_by_one(
    np.repeat(make_batch().images, g, 0),
    *(
      jnp.repeat(x, g, 0)
      for x in (rollout.lead, rollout.lead_valid, rollout.is_answer)
    ),
    said.reshape(-1, WORDS),
  )
  expected = np.where(drawn, expected.reshape(drawn.shape), 0)
  np.testing.assert_allclose(scored.text, expected, atol=1e-4)


def test_the_surrogate_has_the_policy_gradient_at_ratio_one():
  config = make_config(
    **{"rl.text_weight": 0.5, "rl.scale_weights": [1.0, 0.25, 2.0]}
  )
  rollout, _, _ = sampled(make_config())
  rng = np.random.default_rng(1)
  rollout = rollout._replace(advantages=rng.normal(size=(ROWS, 8)))
  graph, state = nnx.split(make_model())
  batch = jax.tree.map(jnp.asarray, make_batch())
  counts = jnp.asarray(7.0 * 8)

  def minimized(state):
    model = nnx.merge(graph, state)
    return rl.part(
      model, batch, config, noise=rollout, counts=counts, warm=False
    )[0]

  def policy(state):
    found = rl.log_probs(nnx.merge(graph, state), batch, config, rollout)
    weights = np.repeat(np.float32([1.0, 0.25, 2.0]), [1, 4, 16])
    whole = 0.5 * jnp.sum(found.text, -1) + found.codes @ weights
    each = rollout.weight[:, None] * rollout.advantages * whole
    return -jnp.sum(each) / (7 * 8)

  trains = trainable_filter(config.rl.optimizer, state)
  graph, state, fixed = nnx.split(make_model(), trains, ...)
  merged = functools.partial(nnx.merge_state)
  actual, expected = jax.jit(
    lambda s: (
      jax.grad(lambda p: minimized(merged(p, fixed)))(s),
      jax.grad(lambda p: policy(merged(p, fixed)))(s),
    )
  )(state)
  assert optax.tree.norm(expected) > 0.1
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
    actual,
    expected,
  )


def test_clipping_stops_the_gradient_beyond_its_bounds():
  gradient = jax.vmap(
    jax.grad(lambda x, a: rl.surrogate(x, a, 0.2)[0]), in_axes=(0, 0)
  )
  ratios = jnp.array([0.5, 0.5, 1.5, 1.5])
  signs = jnp.array([1.0, -1.0, 1.0, -1.0])
  found = gradient(jnp.log(ratios), signs)
  np.testing.assert_allclose(found, [0.5, 0, 0, -1.5], rtol=1e-6)


def test_divergence_estimates_kl():
  """Its mean under a distribution is the distribution's KL to another."""
  p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
  mean = np.sum(p * rl.divergence(jnp.log(q / p)))
  np.testing.assert_allclose(mean, np.sum(p * np.log(p / q)), rtol=1e-5)


def start(config: RunConfig, sizes=(1, 1, 1), optimizer=None):
  """The compiled step and its first inputs on a mesh."""
  mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
  trains = trainable_filter(config.rl.optimizer, nnx.state(make_model()))
  graph, params, fixed = nnx.split(make_model(), trains, ...)
  params, fixed = jax.device_put(
    (params, fixed), sharding.state_shardings((params, fixed), mesh)
  )
  optimizer = optimizer or optax.sgd(1.0)
  everywhere = sharding.replicated(mesh)
  kept = None
  if config.rl.kl:  # Elsewhere than the weights, so that there is a distance.
    kept = jax.tree.map(lambda p: p * 1.1, params)
  state = TrainState(
    step=jax.device_put(jnp.zeros((), jnp.int32), everywhere),
    params=params,
    fixed=fixed,
    optimizer=optimizer.init(params),
    usage=jax.device_put(jnp.zeros((11,), jnp.int32), everywhere),
    start=kept,
  )
  step = make_train_step(graph, optimizer, config, TASKS["rl"], mesh=mesh)
  return jax.jit(step), state, sharding.put_batch(make_batch(), mesh)


def assert_same(*found):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-5), *found
  )


def taken(step, state, batch):
  """Parameters and metrics after a step."""
  state, metrics = step(state, batch)
  metrics.pop("verdict")
  return jax.device_get((nnx.to_pure_dict(state.params), metrics))


@pytest.mark.long
def test_eight_devices_take_both_updates_of_one():
  """Of batches in turns, with a distance to the start."""
  changes = {"rl.kl": 0.1, "rl.updates": 2, "rl.rewards": ["iou", "format"]}
  found = []
  for sizes, turns in (((1, 1, 1), 1), ((2, 2, 2), 2)):
    config = make_config(**changes, **{"rl.train.accumulate_steps": turns})
    step, state, batch = start(config, sizes, optimizer=optax.sgd(0.1))
    before = nnx.to_pure_dict(state.params)
    found.append(taken(step, state, batch))
  metrics = found[0][1]
  assert metrics["kl"] > 0
  assert metrics["differing_groups"] > 0
  moved = optax.tree.norm(optax.tree.sub(found[0][0], jax.device_get(before)))
  assert moved > 1e-3
  assert_same(*found)


BANDIT = {"rl.rewards": ["word"]}
ADAM = optax.adam(0.02, eps=1e-2)  # Steps follow gradients smoothly.


@pytest.fixture(scope="module")
def bandit():
  """The step of a policy that is paid for one word of 31, and its inputs."""
  with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as m:
    m.setitem(rewards.REWARDS, "word", _word)
    step, *inputs = start(make_config(**BANDIT), optimizer=ADAM)
    return step.lower(*inputs).compile(), *inputs


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one(bandit):
  config = make_config(**BANDIT)
  assert_same(taken(*start(config, (2, 2, 2), ADAM)), taken(*bandit))


def test_answers_of_equal_worth_move_nothing(bandit):
  step, state, batch = bandit
  ends = jnp.full_like(batch.targets, IGNORE_TARGET).at[:, 9].set(IDS.im_end)
  nothing = batch._replace(
    targets=jax.device_put(ends, batch.targets.sharding),
    mask_valid=jnp.zeros_like(batch.mask_valid),
  )
  after, metrics = step(state, nothing)
  np.testing.assert_allclose(metrics["reward"], 0.7, rtol=1e-6)
  assert metrics["grad_norm"] == 0
  jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_a_bandit_is_solved(bandit):
  step, state, batch = bandit
  weight = jnp.where(jnp.arange(ROWS) < ROWS - 2, 1.0, 0.0)
  batch = batch._replace(
    sample_weight=jax.device_put(weight, batch.sample_weight.sharding)
  )
  found = []
  for _ in range(40):
    state, metrics = step(state, batch)
    found.append(float(metrics["reward"]))
  assert np.mean(found[:3]) < 0.2
  assert np.mean(found[-5:]) > 0.95


def test_advantages_are_relative_to_the_group():
  config = make_config().rl
  values = jnp.array([[0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 1.0, 1.0]])
  plain = rollouts.advantages(
    values, dataclasses.replace(config, normalize=False)
  )
  np.testing.assert_array_equal(plain, [[0] * 4, [-0.5, -0.5, 0.5, 0.5]])
  scaled = rollouts.advantages(values, config)
  np.testing.assert_allclose(scaled[1], [-1, -1, 1, 1], rtol=1e-3)
  assert not scaled[0].any()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rl.rewards": ["iuo"]}, "'iuo'; use iou, boundary, format"),
    ({"rl.rewards": ["no.such:thing"]}, "cannot be imported"),
    ({"rl.rewards": []}, "name each reward once"),
    ({"rl.reward_weights": [1.0, 2.0]}, "holds 2 numbers for 1"),
    ({"data.pack": 2}, "'data.pack' is 2"),
    ({"rl.text_temperature": 0.0, "rl.code_temperature": 0.0}, "to chance"),
  ],
)
def test_settings_that_do_not_suit_are_named(changes, message):
  with pytest.raises(ConfigError, match=message):
    rl.check(make_config(**changes))


def test_the_start_is_kept_in_checkpoints(tmp_path):
  config = make_config(**{"rl.kl": 0.1, "rl.train.compute_dtype": "bfloat16"})
  described = describe(
    *nnx.split(make_model()),
    config.rl,
    num_codes=11,
    mesh=sharding.make_mesh(config.mesh, jax.devices()[:1]),
  )
  state = described.begin(nnx.state(make_model()))
  kept = nnx.to_pure_dict(state.start)["llm"]["embedding"]
  assert kept.dtype == jnp.bfloat16
  moved = jax.tree.map(lambda p: p + 1, state.params)
  state = state._replace(params=moved)
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, described.saved(state), state.counters, {"data": {}})
  saved.wait()
  again, _ = described.restore(saved, 1)
  saved.close()
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_start_is_needed():
  with pytest.raises(ConfigError, match="'rl' starts from a model that segm"):
    initialize.require_model("rl", None)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rl.scale_weights": [1.0]}, "holds 1 numbers; the model has 3 scales"),
    ({"data.sequence_length": 20}, "leave no room"),
  ],
)
def test_settings_that_do_not_suit_the_model_are_named(changes, message):
  config = make_config(**changes)
  step, state, batch = start(config)
  with pytest.raises(ConfigError, match=message):
    jax.eval_shape(step, state, batch)
