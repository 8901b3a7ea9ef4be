"""Text tokenizers made from the files of slow ones: the same ids."""

import json
import random
import re

import pytest
import slow_tokenizer
from slow_tokenizer import SPECIAL, WORDS

from argenseg_jax.data import text
from argenseg_jax.torch_weights import sentencepiece_model, text_tokenizer
from argenseg_jax.torch_weights.tensors import WeightsError

spm = pytest.importorskip("sentencepiece")

ODD = (
  "\n",
  "日",
  "\u3000",
  "\x00",
  "ñ",
  "👩‍👩‍👧",
  "\r\n",
  "<u>",
  "a b",
  "</s>",
)
# What differs from InternLM2's settings.
MODELS = {
  "mixed": {},
  "repetitive": dict(vocab_size=450),
  "no_prefix": dict(add_dummy_prefix=False),
  "user_defined": dict(user_defined_symbols=["<u>", "man", "a b", "<u><u>"]),
  "fewer_spaces": dict(remove_extra_whitespaces=True),
  "no_bytes": dict(byte_fallback=False, vocab_size=400),
}


def _strings(count: int, pieces=()):
  rng = random.Random(1)
  pools = (
    "ab ",
    WORDS + ODD,
    "".join(WORDS + ODD),
  )
  for i in range(count):
    pool = [*pools[i % len(pools)], *pieces]
    yield "".join(rng.choices(pool, k=rng.randrange(20)))


def _compare(tmp_path, name: str, count: int) -> None:
  data = slow_tokenizer.train(**MODELS[name])
  theirs = spm.SentencePieceProcessor(model_proto=data)
  (tmp_path / "tokenizer.model").write_bytes(data)
  plain = text_tokenizer.convert(tmp_path)
  assert plain is not None
  for line in _strings(count):
    found = plain.encode(line, add_special_tokens=False).ids
    assert found == theirs.encode(line), repr(line)
  assert plain.encode("").ids == [theirs.bos_id()]
  if name in ("fewer_spaces", "no_bytes"):  # Spaces and characters are lost.
    return
  line = "the 红 man 👩‍👩‍👧\n x1"
  ids = theirs.encode(line)
  assert plain.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_sentencepiece(tmp_path, name):
  _compare(tmp_path, name, 300)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_ids_of_sentencepiece_on_many_strings(tmp_path, name):
  _compare(tmp_path, name, 10_000)


def test_text_between_special_tokens_is_encoded_on_its_own(tmp_path):
  data = slow_tokenizer.train()
  ids = slow_tokenizer.write_folder(tmp_path, data)
  theirs = spm.SentencePieceProcessor(model_proto=data)
  made = text_tokenizer.convert(tmp_path)
  assert made is not None
  cut = re.compile("(" + "|".join(map(re.escape, ids)) + ")")
  for line in _strings(400, [*ids] * 3):
    wanted = [1]
    for part in cut.split(line):
      wanted += [ids[part]] if part in ids else theirs.encode(part)
    assert made.encode(line).ids == wanted, repr(line)


def _write_qwen(path):
  """Byte-level BPE of a few merges, in Qwen2's files."""
  shipped = json.loads(text.SHIPPED.read_text())["model"]
  vocabulary = {
    t: i
    for i, t in enumerate(
      t for t in shipped["vocab"] if not re.fullmatch("<.+>", t)
    )
  }
  merges = [m if isinstance(m, str) else " ".join(m) for m in shipped["merges"]]
  (path / "vocab.json").write_text(json.dumps(vocabulary))
  (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
  added = ("<|endoftext|>", *SPECIAL)
  decoder = {
    str(len(vocabulary) + i): {"content": token, "special": True}
    for i, token in enumerate(added)
  }
  (path / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "added_tokens_decoder": decoder,
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "pad_token": "<|endoftext|>",
      }
    )
  )


def test_ids_of_qwen(tmp_path):
  transformers = pytest.importorskip("transformers")
  _write_qwen(tmp_path)
  theirs = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
  made = text_tokenizer.convert(tmp_path)
  assert made is not None
  for line in _strings(300, [*SPECIAL, "It's 2026", " don't", "!?\n\n"]):
    assert made.encode(line).ids == theirs.encode(line), repr(line)
    assert made.decode(made.encode(line).ids, skip_special_tokens=False) == (
      theirs.decode(theirs.encode(line))
    )


def test_new_tokens_reach_the_files_of_the_slow_tokenizer(tmp_path):
  ids = slow_tokenizer.write_folder(tmp_path, slow_tokenizer.train())
  with text_tokenizer.opened(tmp_path) as file:
    assert file is not None
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
  first = max(ids.values()) + 1
  text_tokenizer.add_tokens(
    tmp_path, {"<mask>": first, "<ge_start>": first + 1}
  )
  assert text_tokenizer.size(tmp_path / "tokenizer.json") == first + 2
  (tmp_path / "tokenizer.json").unlink()
  again = text_tokenizer.convert(tmp_path)  # From the slow files alone.
  assert again is not None
  assert again.encode("<mask><ge_start>").ids == [1, first, first + 1]
  again.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(WeightsError, match="its vocabulary is not that of"):
    text_tokenizer.add_tokens(tmp_path, {"<ge_end>": first + 7})


def test_files_that_cannot_be_used_are_named(tmp_path):
  path = tmp_path / "tokenizer.model"
  good = slow_tokenizer.train()
  other = slow_tokenizer.train(model_type="unigram", vocab_size=330)
  for data, message in (
    (b"", "not a SentencePiece model: it has no pieces"),
    (good[:-9], "not a SentencePiece model"),
    (b"\xff" * 40, "not a SentencePiece model"),
    (b"<html></html>", "not a SentencePiece model"),
    (other, "only BPE models"),
  ):
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=message) as error:
      sentencepiece_model.read(path)
    assert str(path) in str(error.value)
  path.write_bytes(good)
  twice = '{"added_tokens_decoder": {"5": {"content": "<a>"}, "7": '
  twice += '{"content": "<a>"}}}'
  for name, content, message in (
    ("added_tokens.json", '{"<a>": "x"}', "does not list added tokens"),
    ("added_tokens.json", "[]", "is not a JSON object"),
    ("tokenizer_config.json", twice, "'<a>' the id 5"),
    (
      "tokenizer_config.json",
      '{"bos_token": "<b>"}',
      "no id for its bos_token",
    ),
  ):
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=message):
      text_tokenizer.convert(tmp_path)
    (tmp_path / name).unlink()
  path.unlink()
  assert text_tokenizer.convert(tmp_path) is None
  (tmp_path / "vocab.json").write_text('{"a": 0}')
  (tmp_path / "merges.txt").write_text("a b c\n")
  with pytest.raises(WeightsError, match=r"vocab\.json and merges\.txt"):
    text_tokenizer.convert(tmp_path)
