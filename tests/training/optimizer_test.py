"""Schedules, decay on matrices only, freezing by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from argenseg_jax import sharding
from argenseg_jax.config import ConfigError, MeshConfig, OptimizerConfig
from argenseg_jax.training.optimizer import (
  decay_mask,
  init_moments,
  make_optimizer,
  schedule,
  trainable_filter,
)


def config(**changes) -> OptimizerConfig:
  values = dict(
    name="adamw",
    learning_rate=1.0,
    muon_learning_rate=0.5,
    schedule="cosine",
    warmup_steps=4,
    end_fraction=0.1,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    frozen=(),
    ema_decay=0.0,
  )
  return OptimizerConfig(**(values | changes))


@pytest.mark.parametrize(
  ("name", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)]
)
def test_schedule_rises_then_descends(name, middle):
  rate = schedule(config(schedule=name), 24)
  np.testing.assert_allclose([rate(i) for i in range(4)], [0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(rate(4), 1.0)
  np.testing.assert_allclose(rate(14), middle, rtol=1e-5)
  np.testing.assert_allclose(rate(24), 0.1 if name != "constant" else 1.0)


def test_no_warmup_starts_at_the_peak():
  assert schedule(config(warmup_steps=0), 10)(0) == 1.0


def test_decay_spares_norms_and_biases_even_when_stacked():
  params = nnx.state(tiny_model.model().llm, nnx.Param)
  mask = nnx.to_pure_dict(decay_mask(params))
  layer = mask["layers"]
  assert layer["mlp"]["gate"]["kernel"] is True
  assert layer["attention_norm"]["scale"] is False
  assert mask["norm"]["scale"] is False
  assert mask["embedding"] is True


def test_frozen_parts_are_left_out_and_wrong_names_refused():
  model = tiny_model.model()
  state = nnx.state(model)
  trains = trainable_filter(config(frozen=("vqvae", "vision.tower")), state)
  _, params, fixed = nnx.split(model, trains, ...)
  tops = {path[:2] for path, _ in nnx.to_flat_state(params)}
  assert ("vision", "connector") in tops
  assert ("vision", "tower") not in tops
  assert "vqvae" not in params
  assert "vqvae" in fixed
  with pytest.raises(ConfigError, match=r"optimizer.frozen.*vqvea"):
    trainable_filter(config(frozen=("vqvea",)), state)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_first_update_is_the_clipped_sign(name):
  params = nnx.state(tiny_model.model().llm.norm, nnx.Param)
  optimizer = make_optimizer(config(name=name, warmup_steps=0), 10, params)
  grads = jax.tree.map(lambda x: jnp.full_like(x, 100.0), params)
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
  for leaf in jax.tree.leaves(updates):
    np.testing.assert_allclose(leaf, -1.0, rtol=1e-4)


def test_muon_steps_are_orthogonal_and_spare_other_parameters():
  params = nnx.state(tiny_model.model().llm, nnx.Param)
  key = jax.random.key(0)
  grads = jax.tree.map(
    lambda x: jax.random.normal(jax.random.fold_in(key, x.size), x.shape),
    params,
  )
  plain = dict(warmup_steps=0, schedule="constant", weight_decay=0.0)
  updates = {}
  with jax.numpy_dtype_promotion("standard"):
    for name in ("adamw", "muon"):
      optimizer = make_optimizer(config(name=name, **plain), 10, params)
      found, _ = optimizer.update(grads, optimizer.init(params), params)
      updates[name] = nnx.to_pure_dict(found)
  for part in ("embedding", "norm"):
    jax.tree.map(
      np.testing.assert_array_equal,
      updates["adamw"][part],
      updates["muon"][part],
    )
  step = updates["muon"]["layers"]["mlp"]["gate"]["kernel"]
  assert step.ndim == 3
  for matrix in step:
    values = np.linalg.svd(matrix, compute_uv=False)
    scale = 0.5 * 0.2 * np.sqrt(max(matrix.shape))
    # Newton-Schulz brings singular values near 1, not to it.
    assert (values > 0.6 * scale).all()
    assert (values < 1.3 * scale).all()


@pytest.fixture(scope="module")
def decoder() -> nnx.State:
  return nnx.state(tiny_model.model().llm, nnx.Param)


def test_factored_moments_are_those_of_adamw_where_squares_have_rank_one(
  decoder,
):
  """Then the outer product of means is the second moment itself."""
  key = jax.random.key(0)

  def rank_one(x):
    rows, columns = (
      jax.random.normal(jax.random.fold_in(key, x.size + i), shape)
      for i, shape in enumerate((x.shape[:-1], (*x.shape[:-2], x.shape[-1])))
    )
    if x.ndim == 1:
      return columns
    return rows[..., :, None] * columns[..., None, :]

  grads = jax.tree.map(rank_one, decoder)
  updates = {}
  with jax.numpy_dtype_promotion("standard"):
    for name in ("adamw", "adafactor"):
      values = config(name=name, weight_decay=0.0, clip_norm=0.0, b1=0.0)
      optimizer = make_optimizer(values, 10, decoder)
      state = optimizer.init(decoder)
      for scale in (1.0, 0.25, 0.5):
        given = jax.tree.map(lambda g, scale=scale: scale * g, grads)
        updates[name], state = optimizer.update(given, state, decoder)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2),
    *updates.values(),
  )


def test_factored_moments_are_small_and_split_like_their_parameters(decoder):
  def moments(name):
    optimizer = make_optimizer(config(name=name), 10, decoder)
    return jax.eval_shape(lambda p: init_moments(optimizer, p), decoder)

  def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  found = moments("adafactor")
  weights = sum(x.size for x in jax.tree.leaves(decoder))
  assert size(moments("adamw")) > 8 * weights
  assert 2 * weights < size(found) < 3 * weights  # Tiny: vectors count.
  mesh = sharding.make_mesh(MeshConfig(4, 2, 1))
  shardings = sharding.state_shardings(found, mesh)
  factored = shardings[1]
  gate = nnx.to_pure_dict(factored.rows)["layers"]["mlp"]["gate"]["kernel"]
  assert gate.spec == sharding.spec(("layers", "embed"))
  gate = nnx.to_pure_dict(factored.columns)["layers"]["mlp"]["gate"]["kernel"]
  assert gate.spec == sharding.spec(("layers", "mlp"))
