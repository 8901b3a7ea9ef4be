"""Weights of others: what is read, what is refused, and for which reason."""

import json

import numpy as np
import pytest

from argenseg_jax import checkpoint
from argenseg_jax.data.errors import DataError
from argenseg_jax.tools import cli
from argenseg_jax.torch_weights import exporting, importing, tensors
from argenseg_jax.torch_weights.tensors import (
  Computed,
  TensorInfo,
  WeightsError,
)

INDEX = "model.safetensors.index.json"


def _entries(arrays):
  return {
    n: (tensors.TensorInfo(a.shape, a.dtype), lambda a=a: a)
    for n, a in arrays.items()
  }


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
  tensors.write_folder(authors, Computed(_entries(arrays)))


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


def _break(authors, fault):
  """Damages a folder; returns a word of the error."""
  index = json.loads((authors / INDEX).read_text())
  files = sorted(set(index["weight_map"].values()))
  name = "mlp1.1.bias"
  path = authors / index["weight_map"][name]
  file = tensors.SafetensorsFile(path)
  entries = _entries({n: file.read(n) for n in file.tensors})
  if fault == "truncated":
    path.write_bytes(path.read_bytes()[:-5])
    return path.name
  if fault == "missing shard":
    (authors / files[1]).unlink()
    return files[1]
  if fault == "index":
    index["weight_map"]["more"] = "model-9.safetensors"
    (authors / INDEX).write_text(json.dumps(index))
    return "model-9.safetensors"
  if fault == "shape":
    entries |= _entries({name: np.zeros(3, np.float32)})
  elif fault == "key too many":
    name = "mlp1.4.bias"
    entries |= _entries({name: np.zeros(3, np.float32)})
    index["weight_map"][name] = path.name
  elif fault == "missing key":
    del entries[name], index["weight_map"][name]
  (authors / INDEX).write_text(json.dumps(index))
  tensors.write_file(path, tensors.Computed(entries), entries)
  return name


FAULTS = (
  "truncated",
  "shape",
  "missing shard",
  "key too many",
  "missing key",
  "index",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_leave_nothing_behind(tmp_path, tiny, folder, capsys, fault):
  authors = folder(tiny.whole())
  word = _break(authors, fault)
  before = sorted(tmp_path.iterdir())
  target = tmp_path / "checkpoint"
  code = cli.main(["import", "--from", str(authors), "--to", str(target)])
  message = capsys.readouterr().err
  assert code == 2
  assert word in message
  assert message.startswith("argenseg import: ")
  assert message.count("\n") == 1
  assert sorted(tmp_path.iterdir()) == before


def test_a_fault_while_writing_leaves_nothing_behind(
  tmp_path, tiny, folder, monkeypatch
):
  authors = folder(tiny.whole())
  monkeypatch.setattr(
    checkpoint.Checkpoints,
    "save",
    lambda *a: (_ for _ in ()).throw(OSError(28)),
  )
  with pytest.raises(WeightsError, match="cannot be written"):
    _import(tmp_path, authors)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["authors"]


def test_an_existing_target_is_left_alone(tmp_path, tiny, folder):
  authors = folder(tiny.whole())
  (tmp_path / "checkpoint").mkdir()
  with pytest.raises(WeightsError, match="exists already"):
    _import(tmp_path, authors)


@pytest.mark.parametrize(
  ("group", "key", "value", "message"),
  [
    ("llm_config", "num_key_value_heads", 3, "num_key_value_heads 3"),
    ("llm_config", "num_attention_heads", 5, "num_attention_heads 5"),
    ("vision_config", "num_attention_heads", 3, "3 heads"),
    ("vision_config", "image_size", 42, "image_size 42"),
    ("vision_config", "norm_type", "batch_norm", "'batch_norm'"),
    (None, "patch_nums", ["a"], r"patch_nums \['a'\]"),
    (None, "patch_nums", [1, 2, 3, 4], "'pos_1LC' of shape"),
  ],
)
def test_faulty_config_json_is_named(
  tmp_path, tiny, folder, group, key, value, message
):
  authors = folder(tiny.whole())
  values = json.loads((authors / "config.json").read_text())
  (values[group] if group else values)[key] = value
  (authors / "config.json").write_text(json.dumps(values))
  with pytest.raises(WeightsError, match=message):
    _import(tmp_path, authors)
  assert sorted(tmp_path.iterdir()) == [authors]


def test_integer_weights_are_refused(tmp_path, tiny, folder):
  with pytest.raises(WeightsError, match="as int8; quantized"):
    _import(tmp_path, folder(tiny.whole(), np.int8))


def test_a_text_tokenizer_without_special_tokens_is_refused(
  tmp_path, tiny, folder
):
  authors = folder(tiny.whole())
  (authors / "tokenizer.json").write_text("{}")
  with pytest.raises(DataError, match=r"authors/tokenizer\.json"):
    _import(tmp_path, authors)
  assert sorted(tmp_path.iterdir()) == [authors]


def test_unknown_language_model_is_named(tmp_path, tiny, folder):
  authors = folder(tiny.whole())
  values = json.loads((authors / "config.json").read_text())
  values["llm_config"]["architectures"] = ["LlamaForCausalLM"]
  (authors / "config.json").write_text(json.dumps(values))
  with pytest.raises(WeightsError, match="LlamaForCausalLM"):
    _import(tmp_path, authors)
