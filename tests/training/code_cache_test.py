"""Training from codes is training from the masks that they were made of."""

import contextlib
import dataclasses
import os

import jax
import numpy as np
import pytest
import tiny_rows
from flax import nnx

from argenseg_jax.config import ConfigError, LossConfig
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.data import array_record_writer
from argenseg_jax.data.pipeline import TrainIterator
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.training import code_cache
from argenseg_jax.training.batches import open_batches
from argenseg_jax.training.objectives import mllm_loss


@pytest.fixture(scope="module")
def model():
  return tiny_rows.model()


def test_codes_give_the_loss_of_their_masks(model, tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path)
  array_record_writer.build({"train": rows.source}, tmp_path / "packed")
  packed = tiny_rows.of(
    dataclasses.replace(
      rows.config, source="array_record", path=str(tmp_path / "packed")
    )
  )
  path = tmp_path / "codes.npz"
  code_cache.write(packed, model.vqvae, path)
  coded = code_cache.read(packed, model.vqvae, path)
  graph, state = nnx.split(model)
  config = LossConfig(
    "token", drop_scale_inputs=0.0, z_loss=0.0, implementation="auto"
  )

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
  rows = tiny_rows.write("jsonl", tmp_path)
  path = tmp_path / "codes.npz"
  first = code_cache.cached(rows, model.vqvae, path)
  second = code_cache.cached(rows, model.vqvae, path)
  np.testing.assert_array_equal(first.codes, second.codes)
  other = tiny_rows.write("jsonl", tmp_path, max_masks=3, pad_square=True)
  with pytest.raises(ConfigError, match="another max_masks, pad_square; token"):
    code_cache.read(other, model.vqvae, path)
  vqvae = nnx.clone(model.vqvae)
  nnx.update(vqvae, jax.tree.map(lambda x: x * 1.1, nnx.state(vqvae)))
  with pytest.raises(ConfigError, match="another image tokenizer; tokenize"):
    code_cache.read(rows, vqvae, path)
  file = tmp_path / "data.jsonl"
  file.write_text(file.read_text() + "\n")
  rows.source = open_source(rows.config)
  with pytest.raises(ConfigError, match="another source; tokenize again"):
    code_cache.read(rows, model.vqvae, path)
  path.write_bytes(b"no codes")
  with pytest.raises(ConfigError, match="is not a file of"):
    code_cache.read(rows, model.vqvae, path)


def test_kept_codes_of_changed_data_are_renewed_if_accepted(model, tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path)
  path = tmp_path / "codes.npz"
  before = code_cache.cached(rows, model.vqvae, path)
  right = (tmp_path / "masks" / "right.png").read_bytes()
  (tmp_path / "masks" / "left.png").write_bytes(right)
  file = tmp_path / "data.jsonl"
  file.write_text(file.read_text() + "\n")
  rows = tiny_rows.of(rows.config)
  with pytest.raises(ConfigError, match="source; add --accept_changed_data"):
    code_cache.cached(rows, model.vqvae, path)
  after = code_cache.cached(rows, model.vqvae, path, renew=True)
  np.testing.assert_array_equal(after.codes[1, 0], after.codes[1, 1])
  np.testing.assert_array_equal(after.codes[1, 1], before.codes[1, 1])
  assert (before.codes[1, 0] != before.codes[1, 1]).any()
  again = code_cache.cached(rows, model.vqvae, path)
  np.testing.assert_array_equal(again.codes, after.codes)


def test_codes_need_one_mask_a_request(model, tmp_path):
  rows = tiny_rows.write("coco_panoptic", tmp_path)
  with pytest.raises(ConfigError, match="one of several masks at each visit"):
    code_cache.tokenize(rows, model.vqvae)


@pytest.mark.parametrize("name", ["masks/left.png", "a.jpg"])
def test_codes_of_files_that_changed_since_are_refused(name, model, tmp_path):
  """The annotations are the same; an image or a mask is another one."""
  rows = tiny_rows.write("jsonl", tmp_path)
  path = tmp_path / "codes.npz"
  before = code_cache.cached(rows, model.vqvae, path)
  file = tmp_path / name
  content = file.read_bytes()
  file.write_bytes(content)  # Another time, the same content: a copy.
  os.utime(file, (1, 1))
  again = code_cache.read(tiny_rows.of(rows.config), model.vqvae, path)
  np.testing.assert_array_equal(again.codes, before.codes)
  file.write_bytes(content[:-20] + bytes(20))  # Of the same size.
  with pytest.raises(ConfigError, match=r"record 0 .*line 1\) has changed on"):
    code_cache.read(tiny_rows.of(rows.config), model.vqvae, path)
  file.unlink()
  with pytest.raises(ConfigError, match=r"line 1.*; add --accept_changed_data"):
    code_cache.cached(tiny_rows.of(rows.config), model.vqvae, path)


def test_codes_of_shards_that_changed_since_are_refused(model, tmp_path):
  rows = tiny_rows.write("jsonl", tmp_path)
  array_record_writer.build({"train": rows.source}, tmp_path / "packed")
  config = dataclasses.replace(
    rows.config, source="array_record", path=str(tmp_path / "packed")
  )
  path = tmp_path / "codes.npz"
  code_cache.cached(tiny_rows.of(config), model.vqvae, path)
  (shard,) = tiny_rows.of(config).source.files
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  with pytest.raises(ConfigError, match=r"packed-train\.array_record"):
    code_cache.cached(tiny_rows.of(config), model.vqvae, path)


def test_masks_that_each_visit_chooses_are_not_kept(model, tmp_path):
  """Such data trained with no config that caches codes."""
  rows = tiny_rows.write("ade20k", tmp_path / "data", cache_codes=True)
  assert rows.source.has_options
  values = tiny.get_config()
  values.data.path = "unused"
  batches = open_batches(
    run_config(values),
    rows,
    model.vqvae,
    tmp_path,
    global_batch_size=2,
    accept_changed_data=False,
    begins=True,
  )
  with contextlib.closing(batches):
    assert next(batches).seg_masks.any()
  assert not list(tmp_path.glob("codes_*"))
