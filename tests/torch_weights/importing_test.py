"""Import and export of whole folders; faults leave nothing behind."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx

from argenseg_jax import checkpoint, construct, variants
from argenseg_jax.data import text
from argenseg_jax.data.errors import DataError
from argenseg_jax.inference import generate
from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.predictor import Predictor
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.torch_weights import (
  exporting,
  hf_config,
  importing,
  rules,
  tensors,
)
from argenseg_jax.torch_weights.tensors import WeightsError

INDEX = "model.safetensors.index.json"


def _same(a, b):
  assert a.tensors == b.tensors
  for name in a.tensors:
    assert a.read(name).tobytes() == b.read(name).tobytes(), name


def _entries(arrays):
  return {
    n: (tensors.TensorInfo(a.shape, a.dtype), lambda a=a: a)
    for n, a in arrays.items()
  }


def _write_toy_tokenizer(path, ids, **changes):
  """One with the special tokens where `ids` (as changed) has them."""
  ids = dataclasses.replace(ids, **changes)
  words = {t: getattr(ids, f) for f, t in text.SPECIAL_TOKENS.items()}
  words |= {"<unk>": 0, "<s>": ids.bos, "</s>": ids.pad}
  toy = text.TextTokenizer.from_characters(words, first_code=ids.first_code)
  path.write_text(toy.__getstate__()[0])


def _export(tmp_path, source="checkpoint", target="back", **kwargs):
  mesh = importing.conversion_mesh()
  exporting.export_weights(
    tmp_path / source, tmp_path / target, mesh=mesh, **kwargs
  )
  return tensors.SafetensorsFolder(tmp_path / target)


def _import(tmp_path, source, **kwargs):
  return importing.import_weights(
    source,
    tmp_path / "checkpoint",
    mesh=importing.conversion_mesh(),
    **kwargs,
  )


@pytest.mark.parametrize(
  ("llm", "vision", "dtype"),
  [
    ("internlm2", "layer_norm", ml_dtypes.bfloat16),
    ("qwen2_tied", "rms_norm", np.float32),
  ],
)
def test_whole_model_round_trip(tmp_path, tiny, folder, llm, vision, dtype):
  config = tiny.whole(llm, vision)
  authors = folder(config, dtype)
  (authors / "pieces.model").write_bytes(b"pieces")
  (authors / "modeling_internvl_chat.py").write_text("# the authors' code\n")
  imported = _import(tmp_path, authors)
  assert imported.config == config
  loaded = checkpoint.load(tmp_path / "checkpoint")
  assert loaded.model.llm.layers.mlp.up.kernel.dtype == dtype
  back = _export(tmp_path, max_file_bytes=20_000)
  _same(tensors.SafetensorsFolder(authors), back)
  for name in ("pieces.model", "modeling_internvl_chat.py"):
    kept = (tmp_path / "back" / name).read_bytes()
    assert kept == (authors / name).read_bytes()
  values = json.loads((tmp_path / "back" / "config.json").read_text())
  assert values == json.loads((authors / "config.json").read_text())


def test_parts_and_dtype(tmp_path, tiny, folder):
  authors = folder(tiny.whole())
  _import(tmp_path, authors)
  source = tensors.SafetensorsFolder(authors)
  for part, prefix in (
    ("llm", "language_model."),
    ("vqvae", "image_tokenizer."),
  ):
    back = _export(tmp_path, target=part, part=part, dtype="float32")
    wanted = {n for n in source.tensors if n.startswith(prefix)}
    assert {prefix + n for n in back.tensors} == wanted
    for name in back.tensors:
      found = back.read(name)
      assert found.dtype == np.float32
      np.testing.assert_array_equal(
        found, source.read(prefix + name).astype(np.float32)
      )
  # The image tokenizer alone comes back in through its own folder.
  shutil.rmtree(tmp_path / "checkpoint")
  again = _import(tmp_path, tmp_path / "vqvae")
  assert again.task == "vqvae"
  assert again.config.vqvae == tiny.VQVAE
  _same(
    tensors.SafetensorsFolder(tmp_path / "vqvae"),
    _export(tmp_path, target="again"),
  )


@pytest.mark.parametrize("llm", ["internlm2", "qwen2_tied"])
def test_internvl_gets_new_tokens_and_an_image_tokenizer(
  tmp_path, tiny, folder, llm
):
  config = tiny.whole(llm)
  old_rows = config.token_ids.first_code - 4
  authors = folder(config, np.float32)
  whole = tensors.SafetensorsFolder(authors)
  plain = tmp_path / "internvl"
  plain.mkdir()
  vocabulary = ("tok_embeddings", "embed_tokens", "output", "lm_head")

  def rows(name):
    array = whole.read(name)
    return array[:old_rows] if name.split(".")[-2] in vocabulary else array

  kept = [n for n in whole.tensors if n.startswith(("vision", "mlp1", "lang"))]
  made = {n: rows(n) for n in kept}
  tensors.write_folder(
    plain,
    tensors.Computed(_entries(made)),
  )
  values = json.loads((authors / "config.json").read_text())
  del values["vae"], values["text_vocab"], values["set"]
  values["llm_config"]["vocab_size"] = old_rows
  (plain / "config.json").write_text(json.dumps(values))
  starts = llm == "internlm2"
  _write_tokenizer(plain / "tokenizer.json", old_rows, starts=starts)
  # VAR's own file: the image tokenizer's tensors without a prefix.
  state = tiny.abstract(lambda: VQVAE(tiny.VQVAE, rngs=construct.Rngs(0)))
  var = tiny.random_source(rules.vqvae(tiny.VQVAE), state)
  tensors.write_file(tmp_path / "var.safetensors", var, var.tensors)

  imported = _import(tmp_path, plain, vqvae_path=tmp_path / "var.safetensors")
  special = imported.config.token_ids
  assert special.mask == old_rows
  assert special.first_code == old_rows + 4
  assert special.img_context == 3 + starts  # From tokenizer.json.
  back = _export(tmp_path)
  for name in made:
    found = back.read(name)
    if name.split(".")[-2] in vocabulary:
      assert len(found) == old_rows + 4 + tiny.VQVAE.num_codes
      mean = made[name].astype(np.float64).mean(0)
      np.testing.assert_allclose(
        found[old_rows:], np.tile(mean, (20, 1)), atol=1e-6
      )
    np.testing.assert_array_equal(found[: len(made[name])], made[name])
  for name in ("word_embed.weight", "word_embed.bias", "pos_1LC"):
    assert not back.read(name).any()
  for name in var.tensors:
    np.testing.assert_array_equal(
      back.read("image_tokenizer." + name), var.read(name)
    )
  tokenizer = tokenizers.Tokenizer.from_file(
    str(tmp_path / "checkpoint" / "tokenizer.json")
  )
  assert tokenizer.token_to_id("<MASK_CONTEXT>") == special.mask_context


def _write_tokenizer(path, size, *, starts: bool):
  """One that puts `<s>` before every text if it `starts`, as InternLM2's."""
  words = ["</s>", *["<s>"] * starts, "<img>", "</img>", "<IMG_CONTEXT>"]
  words += ["<|im_start|>", "<|im_end|>"]
  words += [f"w{i}" for i in range(size - len(words))]
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(words)}, unk_token="w0"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.add_special_tokens(words[: 6 + starts])
  if starts:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 1)]
    )
  tokenizer.save(str(path))


def test_an_imported_model_knows_its_text_tokenizer(tmp_path, tiny, folder):
  config = tiny.whole()
  authors = folder(config)
  assert not _import(tmp_path, authors).text_tokenizer
  loaded = checkpoint.load(
    tmp_path / "checkpoint", mesh=importing.conversion_mesh()
  )
  with pytest.raises(checkpoint.CheckpointError, match="--tokenizer FILE"):
    Predictor(loaded)
  shutil.rmtree(tmp_path / "checkpoint")
  file = tmp_path / "toy.json"
  # Its ids win over the released ones; but they must fit what is given.
  _write_toy_tokenizer(file, config.token_ids, im_start=5)
  assert _import(tmp_path, authors, text_tokenizer=file).text_tokenizer
  step = checkpoint.step_directory(tmp_path / "checkpoint")
  again = vars(checkpoint.describe(step))
  predictor = Predictor(dataclasses.replace(loaded, **again))
  assert predictor.config.token_ids.im_start == 5
  assert predictor.data.image_side == config.vision.image_side
  _write_toy_tokenizer(tmp_path / "checkpoint/tokenizer.json", config.token_ids)
  found = checkpoint.describe(step)
  with pytest.raises(checkpoint.CheckpointError, match="beside it has changed"):
    checkpoint.text_tokenizer(found)
  with (
    checkpoint.manifest.unverified(),
    pytest.raises(DataError, match=r"im_start\|> the id 3, the model has it"),
  ):
    checkpoint.text_tokenizer(found)


def test_variants_without_a_place_in_the_authors_model(tiny):
  leaves = {"vision_pos": None, "vqvae.quantizer.assignment_cost": None}
  table = rules.argenseg(tiny.whole())
  with pytest.raises(WeightsError, match="vision_pos"):
    exporting.writable(table, leaves)


@pytest.mark.parametrize("part", ["all", "llm", "vqvae"])
def test_the_tiny_variant_is_not_exported(part):
  with pytest.raises(WeightsError, match="no place for this model's"):
    exporting.refuse_variants(variants.get("tiny"), part)
  exporting.refuse_variants(variants.get("argenseg_8b"), part)


def test_export_without_kept_files_takes_the_tokenizer(tmp_path, tiny, folder):
  """What a checkpoint of `argenseg train` looks like."""
  config = tiny.whole()
  _write_toy_tokenizer(tmp_path / "toy.json", config.token_ids)
  authors = folder(config)
  _import(tmp_path, authors, text_tokenizer=tmp_path / "toy.json")
  shutil.rmtree(tmp_path / "checkpoint" / checkpoint.KEPT)
  back = _export(tmp_path, part="llm")
  assert "output.weight" in back.tensors
  found = sorted(p.name for p in (tmp_path / "back").iterdir())
  assert found == ["config.json", "model.safetensors", "tokenizer.json"]
  # A folder named by the user is corrected where the model differs from it.
  values = json.loads((authors / "config.json").read_text())
  values["llm_config"] |= {"num_hidden_layers": 9, "made_by": "them"}
  values["patch_nums"] = [1]
  (authors / "config.json").write_text(json.dumps(values))
  again = _export(tmp_path, target="again", files_from=authors)
  assert (
    again.tensors.keys() == tensors.SafetensorsFolder(authors).tensors.keys()
  )
  found = json.loads((tmp_path / "again" / "config.json").read_text())
  assert found["llm_config"]["num_hidden_layers"] == config.llm.num_layers
  assert found["llm_config"]["made_by"] == "them"
  assert found["patch_nums"] == list(config.vqvae.scales)


@pytest.mark.parametrize("llm", ["internlm2_bias", "qwen2"])
def test_config_json_says_what_the_config_says(tiny, llm):
  config = tiny.whole(llm, "rms_norm")
  values = hf_config.write(config)
  assert hf_config.vision_config(values) == config.vision
  found = hf_config.llm_config(values["llm_config"], tied_head=False)
  factor = found.rope_factor if found.rope_scaling == "none" else 2.0
  assert found == dataclasses.replace(config.llm, rope_factor=factor)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_imported_bf16_model_answers(tmp_path, tiny, folder, dtype):
  _import(tmp_path, folder(tiny.whole()))
  loaded = checkpoint.load(
    tmp_path / "checkpoint",
    mesh=importing.conversion_mesh(),
    dtype=jnp.dtype(dtype),
  )
  ids = loaded.config.token_ids
  prompt = [ids.bos, ids.img_start, ids.img_context, ids.img_end, 5]
  graph, state = nnx.split(loaded.model)

  @jax.jit
  def answer(state):
    model = nnx.merge(graph, state)
    out = generate.generate(
      model,
      GenerationOptions(
        max_text=3,
        start_with_mask=True,
      ),
      tokens=jnp.array([prompt], jnp.int32),
      valid=jnp.ones((1, 5), bool),
      vision=model.vision_embeddings(jnp.zeros((1, 1, 28, 28, 3))),
    )
    return out.num_masks, model.vqvae.decode(out.codes[:, 0])

  count, picture = answer(state)
  assert count[0] == 1
  assert np.isfinite(picture).all()
