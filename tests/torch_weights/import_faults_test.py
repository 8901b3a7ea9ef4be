"""Weights of others: what is read, what is refused, and for which reason."""

import json

import numpy as np
import pytest

from argenseg_jax import checkpoint
from argenseg_jax.torch_weights import exporting, importing, tensors
from argenseg_jax.torch_weights.tensors import (
  Computed,
  TensorInfo,
  WeightsError,
)


def _import(tmp_path, source, **options):
  return importing.import_weights(
    source,
    tmp_path / "checkpoint",
    mesh=importing.conversion_mesh(),
    **options,
  )


def _rewritten(authors, change) -> None:
  """The folder with its tensors changed, in one file."""
  source = tensors.SafetensorsFolder(authors)
  arrays = {name: source.read(name) for name in source.tensors}
  change(arrays)
  for file in authors.glob("*.safetensors*"):
    file.unlink()
  tensors.write_folder(
    authors,
    Computed(
      {
        name: (TensorInfo(a.shape, a.dtype), lambda a=a: a)
        for name, a in arrays.items()
      }
    ),
  )


@pytest.mark.parametrize("said", [False, None])
def test_a_missing_head_is_not_the_embedding(said, tmp_path, tiny, folder):
  authors = folder(tiny.whole())
  _rewritten(authors, lambda a: a.pop("language_model.output.weight"))
  path = authors / "config.json"
  values = json.loads(path.read_text())
  if said is None:
    del values["llm_config"]["tie_word_embeddings"]
  path.write_text(json.dumps(values))
  with pytest.raises(WeightsError, match=r"lacks the head .*fetch it again"):
    _import(tmp_path, authors)
  assert not (tmp_path / "checkpoint").exists()


def test_buffers_that_follow_from_the_config_are_left_out(
  tmp_path, tiny, folder
):
  authors = folder(tiny.whole())
  wanted = tensors.SafetensorsFolder(authors).tensors.keys()

  def add(arrays):
    layer = "language_model.model.layers.{}.attention.rotary_emb.inv_freq"
    for i in range(2):
      arrays[layer.format(i)] = np.ones(2, np.float32)
    arrays["language_model.model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    name = "vision_model.embeddings.position_ids"
    arrays[name] = np.arange(5, dtype=np.int64)[None]

  _rewritten(authors, add)
  _import(tmp_path, authors)
  exporting.export_weights(
    tmp_path / "checkpoint",
    tmp_path / "back",
    mesh=importing.conversion_mesh(),
  )
  assert tensors.SafetensorsFolder(tmp_path / "back").tensors.keys() == wanted


@pytest.mark.parametrize(
  ("large", "fits"),
  [(65504, True), (65519, True), (65520, False), (-7e4, False), (np.inf, True)],
)
def test_float16_takes_what_it_can_hold(large, fits):
  values = np.array([1, large, 2], np.float32)
  info = TensorInfo(values.shape, values.dtype)
  source = exporting._Cast(
    Computed({"x.weight": (info, lambda: values)}), np.dtype(np.float16)
  )
  if fits:
    assert np.isfinite(source.read("x.weight")).sum() == (
      np.isfinite(values).sum()
    )
    return
  with pytest.raises(WeightsError, match=r"1 values of 'x\.weight'.*bfloat16"):
    source.read("x.weight")


@pytest.mark.parametrize(
  ("dtype", "message"),
  [
    ("F8_E4M3", "as F8_E4M3, weights rounded to 8 bits.*bfloat16 release"),
    ("F8_E5M2", "bfloat16 release"),
    ("F4", "as F4, which is not supported; use one of F64"),
    ("U16", "as U16, which is not supported"),
    ([], "is malformed"),
  ],
)
def test_dtypes_that_are_not_read_are_named(dtype, message, tmp_path):
  entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}
  header = json.dumps({"a.weight": entry}).encode()
  path = tmp_path / "model.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(WeightsError, match=message):
    tensors.SafetensorsFile(path)


@pytest.mark.parametrize(
  "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]
)
def test_a_folder_of_pickles_says_how_to_convert_it(name, tmp_path):
  (tmp_path / name).write_bytes(b"pickle")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(
    WeightsError, match=rf"{name}.*convert them first.*save_pretrained"
  ):
    _import(tmp_path, tmp_path)


def test_a_byte_level_tokenizer_is_made_on_request(tmp_path, tiny, folder):
  config = tiny.whole()
  authors = folder(config)
  assert _import(tmp_path, authors, text_tokenizer="bytes").text_tokenizer
  step = checkpoint.step_directory(tmp_path / "checkpoint")
  tokenizer = checkpoint.text_tokenizer(checkpoint.describe(step))
  assert tokenizer.token_ids == config.token_ids
  assert tokenizer.decode(tokenizer.encode("the rest")) == "the rest"
