"""One step: any mesh and any accumulation give what one device gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model
from flax import nnx

from argenseg_jax import construct, sharding
from argenseg_jax.config import ConfigError, MeshConfig, RunConfig
from argenseg_jax.config_parsing import replace, run_config
from argenseg_jax.configs import tiny
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.planning import hlo
from argenseg_jax.runtime.nan_guard import Verdict
from argenseg_jax.training.optimizer import init_moments, trainable_filter
from argenseg_jax.training.state import TrainState
from argenseg_jax.training.step import make_train_step, update_average
from argenseg_jax.training.tasks import IMAGE_TOKENIZER, TASKS
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET, Batch

ROWS, LENGTH = 8, 32
LAYERS = 5  # One more than a loop is unrolled for.


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


def make_config(**changes) -> RunConfig:
  values = tiny.get_config()
  values.data.path = "unused"
  values.mllm.train.global_batch_size = ROWS
  values.vqvae.train.global_batch_size = ROWS
  values.mllm.optimizer.frozen = ("vision.tower", "vqvae")
  values.loss.z_loss = 1e-3
  return replace(run_config(values), changes)


@functools.cache
def make_model() -> ARGenSeg:
  """Two key-value heads and drop path; code embeddings away from zero, where
  RMSNorm's gradient explodes."""
  changes = {
    "vision.drop_path": 0.3,
    "llm.num_kv_heads": 2,
    "llm.num_layers": LAYERS,
  }

  @jax.jit
  def build():
    made = ARGenSeg(
      replace(tiny_model.config(), changes), rngs=construct.Rngs(0)
    )
    key = jax.random.key(1)
    made.pos_embed[...] = jax.random.normal(key, made.pos_embed.shape)
    return nnx.split(made)

  return nnx.merge(*build())


def make_batch() -> Batch:
  """Rows with unequal numbers of text and code targets, one of weight 0."""
  rng = np.random.default_rng(0)
  ids = tiny_model.TOKEN_IDS
  n = 21
  tokens = rng.integers(10, 20, (ROWS, LENGTH)).astype(np.int32)
  targets = np.full((ROWS, LENGTH), IGNORE_TARGET, np.int32)
  tokens[:, 1:5] = ids.img_context
  tokens[:, 7] = ids.ge_start
  tokens[:, 8 : 8 + n - 1] = ids.mask_context
  targets[:, 7 : 7 + n] = CODE_TARGET
  targets[::2, :7] = IGNORE_TARGET
  targets[1::2, 4:7] = rng.integers(10, 20, (ROWS // 2, 3))
  targets[3, 7:] = IGNORE_TARGET
  weight = np.ones(ROWS, np.float32)
  weight[5] = 0
  return Batch(
    tokens=tokens,
    targets=targets,
    positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    segment_ids=np.ones((ROWS, LENGTH), np.int32),
    is_prompt=np.tile(np.arange(LENGTH) < 7, (ROWS, 1)),
    images=rng.integers(0, 256, (ROWS, 1, 16, 16, 3)).astype(np.uint8),
    seg_masks=rng.integers(0, 256, (ROWS, 1, 16, 16, 3)).astype(np.uint8),
    mask_valid=np.ones((ROWS, 1), bool),
    codes=rng.integers(0, 11, (ROWS, 1, n)).astype(np.int32),
    sample_weight=weight,
    sample_id=np.arange(ROWS),
  )


def start(
  config: RunConfig, sizes, name="mllm", *, slices=1, task=None, optimizer=None
):
  """Jitted step, its state on a mesh, and the mesh.

  Plain gradient descent: new parameters show the gradients.
  """
  mesh = sharding.make_mesh(
    MeshConfig(*sizes), jax.devices()[: slices * np.prod(sizes)], slices=slices
  )
  whole = make_model()
  model = whole if name == "mllm" else whole.vqvae
  trains = trainable_filter(config.stage(name).optimizer, nnx.state(model))
  graph, params, fixed = nnx.split(model, trains, ...)
  params, fixed = jax.device_put(
    (params, fixed), sharding.state_shardings((params, fixed), mesh)
  )
  optimizer = optimizer or optax.sgd(1.0)
  everywhere = sharding.replicated(mesh)
  state = TrainState(
    step=jax.device_put(jnp.zeros((), jnp.int32), everywhere),
    params=params,
    fixed=fixed,
    optimizer=optimizer.init(params),
    usage=jax.device_put(jnp.zeros((11,), jnp.int32), everywhere),
  )
  step = make_train_step(
    graph,
    optimizer,
    config,
    task or TASKS[name],
    mesh=mesh,
    warm=task is not None,
  )
  return jax.jit(step), (state, sharding.put_batch(make_batch(), mesh))


def take(config, sizes, **kwargs):
  step, inputs = start(config, sizes, **kwargs)
  return results_of(step, *inputs)


def results_of(step, *inputs):
  state, metrics = step(*inputs)
  return jax.device_get((nnx.to_pure_dict(state.params), metrics))


def assert_same(actual, expected):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-5),
    actual,
    expected,
  )


@pytest.fixture(scope="module")
def started():
  """Step, state and batch of each task on one device."""
  with jax.numpy_dtype_promotion("standard"):
    config = make_config()
    return {t: start(config, (1, 1, 1), t) for t in ("mllm", "vqvae")}


@pytest.fixture(scope="module")
def one_device(started):
  with jax.numpy_dtype_promotion("standard"):
    return {
      task: results_of(step, *inputs)
      for task, (step, inputs) in started.items()
    }


@pytest.fixture(scope="module")
def over_fsdp():
  """Results of the step on eight devices along fsdp, its collectives, and the
  shapes of split parameters (of one layer)."""
  with jax.numpy_dtype_promotion("standard"):
    config = make_config(**{"mllm.train.remat": "full"})
    step, inputs = start(config, (1, 8, 1))
    shapes = {
      tuple(sorted(v.shape["layers" in v.get_metadata()["axes"] :]))
      for _, v in nnx.to_flat_state(inputs[0].params)
      if sharding.is_split(v)
    }
    compiled = step.lower(*inputs).compile()
    state, metrics = compiled(*inputs)
    results = jax.device_get((nnx.to_pure_dict(state.params), metrics))
    return results, hlo.collectives(compiled.as_text()), shapes


@pytest.mark.slow
def test_fsdp_gives_loss_and_gradients_of_one_device(over_fsdp, one_device):
  assert_same(over_fsdp[0], one_device["mllm"])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("sizes", "slices", "turns", "remat"),
  [
    ((1, 1, 2), 1, 1, "full"),
    ((2, 2, 2), 1, 2, "dots"),
    ((2, 2, 1), 2, 1, "none"),
    ((1, 2, 1), 1, 1, "offload"),
  ],
)
def test_mixed_meshes_give_loss_and_gradients_of_one_device(
  sizes, slices, turns, remat, one_device
):
  """Whatever the turns of accumulation and the remat policy."""
  changes = {
    "mllm.train.accumulate_steps": turns,
    "mllm.train.remat": remat,
  }
  assert_same(
    take(make_config(**changes), sizes, slices=slices), one_device["mllm"]
  )


@pytest.mark.slow
def test_image_tokenizer_on_a_mesh_in_turns(one_device):
  config = make_config(**{"vqvae.train.accumulate_steps": 2})
  actual = take(config, (2, 1, 1), name="vqvae", slices=2)
  assert_same(actual, one_device["vqvae"])


@pytest.mark.slow
def test_gradients_of_layers_and_head_are_reduce_scattered(over_fsdp):
  _, found, shapes = over_fsdp
  scattered = [c for c in found if c.kind == "reduce-scatter"]
  # Of a layer only its two norms are kept whole.
  assert sum(c.runs == LAYERS for c in scattered) == 7
  # Head and word embedding.
  assert [c.runs for c in scattered if 31 in c.shapes[0]] == [1, 1]
  matrices = {shape for shape in shapes if len(shape) > 1}
  assert hlo.reduced_whole(found, matrices, parts=8) == []
  # Weights are gathered forward and once more backward, layer by layer.
  gathered = [c for c in found if c.kind == "all-gather" and c.runs == LAYERS]
  assert len(gathered) == 14


def assert_skipped(started, weights=None, **changes) -> Verdict:
  """The verdict on a step that must change nothing."""
  step, (state, batch) = started
  if weights is not None:
    batch = batch._replace(sample_weight=weights)
  state = state._replace(**changes)
  after, metrics = step(state, batch)
  verdict = jax.device_get(metrics["verdict"])
  assert verdict.skipped
  assert int(after.step) == int(state.step) + 1
  jax.tree.map(
    np.testing.assert_array_equal, after._replace(step=state.step), state
  )
  return verdict


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_a_step_without_a_finite_loss_changes_nothing(started, weight):
  weights = np.ones(ROWS, np.float32)
  weights[2] = weight
  verdict = assert_skipped(started["mllm"], weights)
  assert not verdict.update_only
  assert sorted(verdict.records) == list(range(ROWS))


@pytest.mark.slow
def test_records_are_named_by_the_part_that_was_not_finite():
  """Two rows a device; a sum of row 3 overflows, its count does not."""
  weights = np.ones(ROWS, np.float32)
  weights[3] = 1e38
  verdict = assert_skipped(start(make_config(), (2, 2, 1)), weights)
  assert sorted(set(verdict.records)) == [-1, 2, 3]


def toy(loss):
  """The image tokenizer's task with another loss, which takes the model."""

  def part(model, batch, config, **_):
    value = loss(model)
    return value, {"reconstruction": value, "vq": jnp.zeros(())}

  return dataclasses.replace(IMAGE_TOKENIZER, loss=part)


def _moved(model):
  return jnp.sum((model.quantizer.codebook[...] - 1.0) ** 2)


def _gradient_of_nan(model):
  """Whose value is 0."""
  return jnp.sqrt(0.0 * jnp.sum(model.quantizer.codebook[...]))


@pytest.mark.parametrize(
  ("loss", "optimizer", "update_only"),
  [
    (_gradient_of_nan, optax.adam(1.0), False),
    # Most parameters have no gradient: 0 / 0.
    (_moved, optax.adam(1.0, eps=0.0), True),
  ],
)
def test_no_other_number_that_is_not_finite_changes_anything(
  loss, optimizer, update_only
):
  started = start(
    make_config(), (1, 1, 1), "vqvae", task=toy(loss), optimizer=optimizer
  )
  average = jax.tree.map(jnp.copy, started[1][0].params)
  assert assert_skipped(started, average=average).update_only == update_only


def test_the_check_of_all_parameters_is_compiled_once():
  """XLA fused it into every parameter's update: 57,274 `and`s."""
  step, inputs = start(
    make_config(), (1, 1, 1), "vqvae", task=toy(_moved), optimizer=optax.adam(1)
  )
  compiled = step.lower(*inputs).compile().as_text()
  assert compiled.count(" and(") < 10 * len(jax.tree.leaves(inputs[0].params))


def test_a_finite_step_is_not_skipped(one_device):
  for _, metrics in one_device.values():
    assert not metrics["verdict"].skipped
    assert set(metrics["verdict"].records) == {-1}


def test_frozen_parts_have_no_gradient_and_no_moment():
  _, (state, _) = start(make_config(), (1, 1, 1))
  frozen = {path[0] for path, _ in nnx.to_flat_state(state.fixed)}
  assert frozen == {"vision", "vqvae"}
  moments = init_moments(optax.adam(1.0), state.params)
  paths = {p for p, _ in nnx.to_flat_state(moments[0].mu)}
  assert paths == {p for p, _ in nnx.to_flat_state(state.params)}


def test_moments_of_bfloat16_weights_are_float32():
  _, (state, _) = start(make_config(), (1, 1, 1))
  half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params)
  moments = init_moments(optax.adam(1.0), half)
  assert {m.dtype for m in jax.tree.leaves(moments[0].nu)} == {
    jnp.dtype("float32")
  }


def test_average_starts_at_the_weights_and_follows():
  params = nnx.State({"w": nnx.Param(jnp.ones(2))})
  average = nnx.State({"w": nnx.Param(jnp.zeros(2))})
  early = update_average(average, params, jnp.int32(0), 0.999)
  late = update_average(average, params, jnp.int32(10**6), 0.999)
  np.testing.assert_allclose(early["w"][...], 0.9)
  np.testing.assert_allclose(late["w"][...], 0.001, rtol=1e-4)


def test_batch_that_does_not_divide_is_one_sentence():
  config = make_config(**{"mllm.train.accumulate_steps": 3})
  with pytest.raises(ConfigError, match=r"size 8 .* 6 parts .*_steps 3 "):
    start(config, (2, 1, 1))
