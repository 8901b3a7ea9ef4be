"""Gradient accumulation over the batches that the pipeline makes."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny_model
import tiny_rows
from flax import nnx

from argenseg_jax import sharding
from argenseg_jax.config import MeshConfig
from argenseg_jax.config_parsing import replace, run_config
from argenseg_jax.configs import tiny
from argenseg_jax.data import examples, pipeline
from argenseg_jax.planning import programs
from argenseg_jax.training.objectives import vqvae_loss
from argenseg_jax.training.optimizer import trainable_filter
from argenseg_jax.training.state import TrainState
from argenseg_jax.training.step import make_train_step
from argenseg_jax.training.tasks import DECODER, IMAGE_TOKENIZER

B = 4  # Rows of a batch.


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
  """A batch of each kind that a run makes, and the settings of its rows."""
  rows = tiny_rows.write("jsonl", tmp_path_factory.mktemp("data"))
  codes = np.random.default_rng(0).integers(0, 11, (len(rows.source), 1, 21))
  masks = tiny_rows.of(examples.masks_only(rows.config))
  made = {
    "masks": (DECODER, rows),
    "codes": (DECODER, rows.with_codes(codes.astype(np.int32))),
    "image tokenizer": (IMAGE_TOKENIZER, masks),
  }
  found = {}
  for kind, (task, reader) in made.items():
    iterator = pipeline.TrainIterator(reader, B)
    found[kind] = (task, next(iterator), reader.config)
    iterator.close()
  _, batch, _ = found["image tokenizer"]
  batch.mask_valid[1] = False  # As a bad record leaves it.
  return found


def config_for(task, data, turns):
  values = tiny.get_config()
  values.data.path = "unused"
  config = run_config(values)
  changes = {
    f"{task.name}.train.global_batch_size": B,
    f"{task.name}.train.accumulate_steps": turns,
    "loss.drop_scale_inputs": 0.0,
  }
  return dataclasses.replace(replace(config, changes), data=data)


def take(task, batch, config):
  """Parameters and metrics after a step of plain gradient descent."""
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  whole = tiny_rows.model()
  model = whole if task is DECODER else whole.vqvae
  trains = trainable_filter(config.stage(task.name).optimizer, nnx.state(model))
  graph, params, fixed = nnx.split(model, trains, ...)
  optimizer = optax.sgd(1e-3)
  state = TrainState(
    step=np.int32(0),
    params=params,
    fixed=fixed,
    optimizer=optimizer.init(params),
    usage=np.zeros(tiny_model.config().vqvae.num_codes, np.int32),
  )
  step = make_train_step(graph, optimizer, config, task, mesh=mesh)
  state, metrics = jax.jit(step)(state, sharding.put_batch(batch, mesh))
  return jax.device_get((nnx.to_pure_dict(state.params), metrics))


@pytest.mark.parametrize(
  "kind",
  [
    "codes",
    pytest.param("masks", marks=pytest.mark.slow),
    pytest.param("image tokenizer", marks=pytest.mark.slow),
  ],
)
def test_turns_change_no_loss_and_no_parameter(batches, kind):
  task, batch, data = batches[kind]
  whole = take(task, batch, config_for(task, data, 1))
  assert not whole[1]["verdict"].skipped
  for turns in (2, 4):
    jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-6),
      take(task, batch, config_for(task, data, turns)),
      whole,
    )


def test_what_is_no_mask_trains_nothing(batches):
  """Bad records and unused places were learned as black masks."""
  task, batch, data = batches["image tokenizer"]
  config = config_for(task, data, 1)
  model = tiny_rows.model().vqvae
  loss = jax.jit(
    lambda batch: vqvae_loss(
      model,
      batch,
      reconstruction=config.tokenizer_training.reconstruction,
      quantize=True,
    )
  )
  good = np.flatnonzero(batch.mask_valid)
  assert 0 < len(good) < batch.mask_valid.size  # The others are no masks.
  got, metrics = loss(jax.tree.map(jax.numpy.asarray, batch))
  alone = []
  for place in good:
    valid = np.arange(batch.mask_valid.size) == place
    one = batch._replace(
      mask_valid=valid.reshape(batch.mask_valid.shape),
      seg_masks=batch.seg_masks * valid.reshape(-1, 2, 1, 1, 1),
    )
    alone.append(loss(jax.tree.map(jax.numpy.asarray, one)))
  np.testing.assert_allclose(got, np.mean([a for a, _ in alone]), rtol=1e-5)
  np.testing.assert_array_equal(
    metrics["counts"], sum(m["counts"] for _, m in alone)
  )


@pytest.mark.parametrize("kind", ["masks", "image tokenizer"])
def test_plan_describes_the_batch_that_the_pipeline_makes(batches, kind):
  task, batch, data = batches[kind]
  described = programs.abstract_batch(
    config_for(task, data, 2), tiny_rows.model().config, task
  )
  for name, mine in described._asdict().items():
    assert mine.shape == getattr(batch, name).shape, name
