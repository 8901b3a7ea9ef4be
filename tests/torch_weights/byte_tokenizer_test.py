"""A text tokenizer made for a model that comes without one."""

import dataclasses

import pytest

from argenseg_jax import variants
from argenseg_jax.data import chat, text
from argenseg_jax.torch_weights import byte_tokenizer
from argenseg_jax.torch_weights.tensors import WeightsError


def _opened(ids, tmp_path):
  byte_tokenizer.make(ids).save(str(tmp_path / "tokenizer.json"))
  return text.TextTokenizer(
    tmp_path / "tokenizer.json", first_code=ids.first_code
  )


@pytest.mark.parametrize("variant", ["argenseg_8b", "argenseg_1b"])
def test_any_text_is_read_with_the_models_own_ids(variant, tmp_path):
  ids = variants.get(variant).token_ids
  tokenizer = _opened(ids, tmp_path)
  tokenizer.require(ids)
  assert tokenizer._model.get_vocab_size() == ids.first_code
  for said in ("the red cup", "दो ไม่ é 🦔", "\n\t", "<|im_start|>x", ""):
    read = tokenizer.encode(tokenizer.escape(said))
    assert tokenizer.decode(read, keep_special=True) == said
  prompt = chat.chat_prompt(
    tokenizer, [{"from": "human", "value": "<image>\na"}], image_tokens=[3]
  )
  found = chat.encode_prompt(tokenizer, prompt).tolist()
  assert found.count(ids.img_context) == 3
  assert found.count(ids.im_start) == 2


def test_a_small_vocabulary_reads_common_letters(tmp_path, tiny):
  ids = tiny.whole().token_ids
  tokenizer = _opened(ids, tmp_path)
  tokenizer.require(ids)
  read = tokenizer.encode("The REST\u2028")
  assert tokenizer.decode(read[:-1]) == "the rest"
  assert read.max() < ids.first_code
  full = dataclasses.replace(ids, first_code=14)
  specials = {getattr(full, f) for f in text.SPECIAL_TOKENS}
  shifted = {f: i for i, f in enumerate(("pad", "bos", *text.SPECIAL_TOKENS))}
  crowded = dataclasses.replace(full, **shifted, first_code=11)
  assert len(specials) == 9
  with pytest.raises(WeightsError, match="leave no room"):
    byte_tokenizer.make(crowded)
