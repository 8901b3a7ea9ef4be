"""Training from codes is training from the masks that they were made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from data import layouts
from flax import nnx

from argenseg_jax import mask_codes
from argenseg_jax.config import ConfigError, DataConfig, LossConfig
from argenseg_jax.data import building, text
from argenseg_jax.data.pipeline import TrainIterator
from argenseg_jax.data.row_maker import RowMaker
from argenseg_jax.data.sources.opening import open_source
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.train_step import mllm_loss

TOKENIZER = text.TextTokenizer()


def _rows(layout, folder, **changes):
  folder.mkdir(exist_ok=True)
  config = DataConfig(
    **{
      **layouts.write(layout, folder),
      "sequence_length": 160,
      "image_side": 16,
      "mask_side": 16,
      "mask_channels": 1,
      **changes,
    }
  )
  return RowMaker(
    open_source(config),
    config,
    tokenizer=TOKENIZER,
    image_tokens=4,
    num_codes=21,
  )


@pytest.fixture(scope="module")
def model():
  config = tiny_model.config()
  config = dataclasses.replace(
    config,
    token_ids=TOKENIZER.token_ids,
    llm=dataclasses.replace(
      config.llm, vocab_size=TOKENIZER.token_ids.first_code + 11
    ),
  )
  made = nnx.eval_shape(lambda: ARGenSeg(config, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(made)
  draw = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype), state
  )
  return nnx.merge(graph, state)


def test_codes_give_the_loss_of_their_masks(model, tmp_path):
  rows = _rows("jsonl", tmp_path / "from")
  building.build({"train": rows.source}, tmp_path / "packed")
  packed = RowMaker(
    open_source(
      dataclasses.replace(
        rows.config, source="array_record", path=str(tmp_path / "packed")
      )
    ),
    rows.config,
    tokenizer=TOKENIZER,
    image_tokens=4,
    num_codes=21,
  )
  path = tmp_path / "codes.npz"
  mask_codes.write(packed, model.vqvae, path)
  coded = mask_codes.read(packed, model.vqvae, path)
  graph, state = nnx.split(model)
  config = LossConfig("token", drop_scale_inputs=0.0, z_loss=0.0)

  @jax.jit
  def loss(state, batch):
    return mllm_loss(nnx.merge(graph, state), batch, config)

  batches = [next(TrainIterator(r, 6)) for r in (rows, coded)]
  assert batches[0].seg_masks.any()
  assert not batches[1].seg_masks.any()
  assert len(np.unique(batches[1].codes)) > 3
  (a, sums), (b, _) = (loss(state, batch) for batch in batches)
  assert sums.code_count.sum() >= 3 * 21
  np.testing.assert_allclose(a, b, rtol=1e-6)


def test_codes_of_something_else_are_refused(model, tmp_path):
  rows = _rows("jsonl", tmp_path)
  path = tmp_path / "codes.npz"
  first = mask_codes.cached(rows, model.vqvae, path)
  second = mask_codes.cached(rows, model.vqvae, path)
  np.testing.assert_array_equal(first.codes, second.codes)
  other = _rows("jsonl", tmp_path, max_masks=3, pad_square=True)
  with pytest.raises(ConfigError, match="another max_masks, pad_square; token"):
    mask_codes.read(other, model.vqvae, path)
  vqvae = nnx.clone(model.vqvae)
  nnx.update(vqvae, jax.tree.map(lambda x: x * 1.1, nnx.state(vqvae)))
  with pytest.raises(ConfigError, match="another image tokenizer; tokenize"):
    mask_codes.read(rows, vqvae, path)
  file = tmp_path / "data.jsonl"
  file.write_text(file.read_text() + "\n")
  rows.source = open_source(rows.config)
  with pytest.raises(ConfigError, match="another source; tokenize again"):
    mask_codes.read(rows, model.vqvae, path)
  path.write_bytes(b"no codes")
  with pytest.raises(ConfigError, match="is not a file of"):
    mask_codes.read(rows, model.vqvae, path)


def test_codes_need_one_mask_a_request(model, tmp_path):
  rows = _rows("coco_panoptic", tmp_path)
  with pytest.raises(ConfigError, match="one of several masks at each visit"):
    mask_codes.tokenize(rows, model.vqvae)
