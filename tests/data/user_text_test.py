"""What users type is text: in every part of a chat, for every special token of
every family of text tokenizers."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from argenseg_jax.config import DataConfig
from argenseg_jax.data import chat, text, text_corpus
from argenseg_jax.data.errors import DataError
from argenseg_jax.inference import prompts
from argenseg_jax.types import CODE_TARGET

_OURS = tuple(text.SPECIAL_TOKENS.values())
_MARKUP = text.MARKUP
FAMILIES = {
  "shipped": (),
  "internlm2": (
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|plugin|>"),
    *("<|action_start|>", "<|action_end|>", "<|interpreter|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", *_MARKUP),
  ),
  "qwen": (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
    *("<|object_ref_start|>", "<|box_start|>", "<|image_pad|>", "<image>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", *_MARKUP),
  ),
  "llama3": (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|endoftext|>"),
  ),
}
NUM_CODES = 5


def _byte_level(special) -> tokenizers.Tokenizer:
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  values = model.to_str().replace(
    '"vocab":{}',
    '"vocab":{'
    + ",".join(f"{_json(c)}:{i}" for i, c in enumerate(alphabet))
    + "}",
  )
  model = tokenizers.Tokenizer.from_str(values)
  model.add_tokens(["<|fim_prefix|>", "<think>"])  # Not marked as special.
  model.add_special_tokens([*special, *_OURS, "<pad>"])
  return model


def _json(character: str) -> str:
  return f'"\\u{ord(character):04x}"'


def _unigram() -> tokenizers.Tokenizer:
  """SentencePiece's kind: its special tokens are pieces of the vocabulary."""
  pieces = ["<unk>", "<s>", "</s>", *(chr(i) for i in range(33, 127)), "▁"]
  vocabulary = [(p, 0.0 if len(p) > 1 else -3.0) for p in pieces]
  model = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
  model.normalizer = normalizers.NFKC()
  model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
  model.decoder = decoders.Metaspace(prepend_scheme="first")
  model.add_special_tokens(["<unk>", "<s>", "</s>", *_OURS])
  return model


def _opened(model, tmp_path) -> text.TextTokenizer:
  model.save(str(tmp_path / "tokenizer.json"))
  return text.TextTokenizer(tmp_path / "tokenizer.json")


@pytest.fixture(scope="module", params=[*FAMILIES, "unigram", "characters"])
def tokenizer(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  if request.param == "unigram":
    return _opened(_unigram(), folder)
  if request.param == "shipped":
    return text.TextTokenizer()
  if request.param == "characters":
    words = ["<unk>", "<s>", "</s>", *_OURS, *map(chr, range(32, 127)), "\n"]
    return text.TextTokenizer.from_characters(
      {word: i for i, word in enumerate(words)}
    )
  return _opened(_byte_level(FAMILIES[request.param]), folder)


def _specials(tokenizer) -> list[str]:
  """Of the tokenizer, as its file names them."""
  added = tokenizer._model.get_added_tokens_decoder().values()
  ordinary = (*_MARKUP, "<think>")
  return sorted(t.content for t in added if t.content not in ordinary)


def _controls(tokenizer, ids) -> list[int]:
  """The special tokens of some ids, in order."""
  special = [
    tokenizer._model.token_to_id(t)
    for t in _specials(tokenizer)
    if t != "<unk>"
  ]
  return [i for i in map(int, ids) if i in special]


def _placed(token):
  return (f"{token} the cup", f"the {token} cup", f"the cup {token}", token)


def _tokenize(tokenizer, request, answer, system="Be brief."):
  turns = [
    {"from": "human", "value": request},
    {"from": "gpt", "value": answer},
  ]
  return chat.tokenize_chat(
    tokenizer,
    turns,
    image_tokens=(4,),
    num_codes=NUM_CODES,
    system_message=system,
  )


def test_no_special_token_comes_from_text(tokenizer):
  """In requests, expressions, answers, descriptions and system messages."""
  plain = _tokenize(tokenizer, "<image>\nthe cup", "Sure: <mask>.")
  structure = _controls(tokenizer, plain.ids)
  assert structure.count(tokenizer.token_ids.mask_context) == NUM_CODES - 1
  for token in _specials(tokenizer):
    for typed in _placed(token):
      said = chat.as_text(typed)
      turn = said if token == "<image>" else typed  # A placeholder, elsewhere.
      for tokens in (
        _tokenize(tokenizer, f"<image>\n{turn}", "Sure: <mask>."),
        _tokenize(tokenizer, f"{said}<image>", "Sure: <mask>."),
        _tokenize(tokenizer, chat.request_text("free", [typed]), "<mask>"),
        _tokenize(tokenizer, "<image>\nthe cup", f"{said}<mask>"),
        _tokenize(tokenizer, "<image>\nthe cup", f"<mask>{said}"),
        _tokenize(tokenizer, "the cup", "<mask>", system=typed),
      ):
        assert _controls(tokenizer, tokens.ids) == structure, typed
        row = chat.text_row((tokens,), len(tokens), tokenizer.token_ids)
        assert (row.targets == CODE_TARGET).sum() == NUM_CODES
        slots = np.flatnonzero(row.targets == CODE_TARGET)
        assert np.ptp(slots) == NUM_CODES - 1  # Side by side.


def test_what_was_typed_is_what_the_model_reads(tokenizer):
  if tokenizer.name.endswith("given"):
    pytest.skip("the recorders' toy decodes characters with spaces between")
  for token in _specials(tokenizer):
    for typed in _placed(token):
      ids = tokenizer.encode(tokenizer.escape(typed))
      read = tokenizer.decode(ids, keep_special=True)
      assert read.replace(" ", "") == typed.replace(" ", "")


def test_escaping_changes_nothing_but_special_tokens(tokenizer):
  for typed in ("the cup", "a < b", "<imag", "", "<<", "\ufdd5"):
    assert tokenizer.escape(typed) == typed
  twin = tokenizer._twin
  for program in ("<|im_start|>user\nthe cup<|im_end|>\n", "<mask>", "a b"):
    # The twin reads what the tokenizer reads.
    np.testing.assert_array_equal(
      tokenizer._encode_escaped(program), tokenizer.encode(program)
    )
  assert (twin.ids < tokenizer.token_ids.first_code).all()
  copy = pickle.loads(pickle.dumps(tokenizer))
  escaped = copy.escape("<mask>")
  np.testing.assert_array_equal(copy.encode(escaped), tokenizer.encode(escaped))


def test_prediction_reads_what_training_read(tokenizer):
  data = DataConfig(
    path="", source="jsonl", request="referring", system_message="Be brief."
  )
  for token in {*_specials(tokenizer), "<image>", "<image>\n<mask>"}:
    for typed in _placed(token):
      trained = _tokenize(
        tokenizer, chat.request_text("referring", [typed]), "<mask>"
      )
      asked = prompts.of_request(tokenizer, data, typed, image_tokens=(4,))
      np.testing.assert_array_equal(
        asked.ids, trained.ids[: len(asked.ids)], typed
      )
      start = trained.ids[len(asked.ids)]
      assert start == tokenizer.token_ids.ge_start
      forced = prompts.of_request(
        tokenizer, data, "a cup", image_tokens=(4,), answer_prefix=typed
      )
      assert not _controls(tokenizer, forced.ids[-forced.answer_length :])


def test_earlier_answers_lose_their_masks_and_requests_keep_their_words():
  tokenizer = text.TextTokenizer()
  data = DataConfig(path="", source="jsonl")
  turns = [
    {"from": "human", "value": "what is <mask>?"},
    {"from": "gpt", "value": "A word<mask>."},
    {"from": "human", "value": "and <image>?"},
  ]
  asked = prompts.of_turns(tokenizer, data, turns, image_tokens=())
  read = tokenizer.decode(asked.ids, keep_special=True)
  assert "what is <mask>?" in read
  assert "A word." in read
  assert "and <image>?" in read
  assert tokenizer.token_ids.mask not in asked.ids


def test_markup_is_read_as_its_tokens(tmp_path):
  """Boxes and phrases of InternVL's own data."""
  tokenizer = _opened(_byte_level(FAMILIES["internlm2"]), tmp_path)
  said = "<ref>cup</ref><box>[[1, 2, 3, 4]]</box>"
  tokens = _tokenize(tokenizer, "<image>\nwhere?", said)
  box = tokenizer._model.token_to_id("<box>")
  assert (tokens.ids == box).sum() == 1


def test_characters_that_become_a_special_token_are_refused_or_text(tmp_path):
  """A normalizer makes <s> of its full-width form, which nobody escaped."""
  model = _unigram()
  tokens = [
    tokenizers.AddedToken(t, normalized=True, special=True)
    for t in (*_OURS, "<s>")
  ]
  model.add_special_tokens(tokens)
  tokenizer = _opened(model, tmp_path)
  wide = "".join(chr(ord(c) + 0xFEE0) for c in "<mask>")
  ids = tokenizer.encode(f"a {wide} cup")
  assert not _controls(tokenizer, ids)
  with pytest.raises(DataError, match="as special tokens; leave them out"):
    tokenizer.encode(wide.replace("ｍａｓｋ", "ｓ"))


def test_a_vocabulary_that_reaches_into_the_codes_is_refused():
  tokenizer = text.TextTokenizer(first_code=100)
  with pytest.raises(DataError, match="codes begin at id 100"):
    tokenizer.require(tokenizer.token_ids)


def test_the_corpus_is_read_the_same_with_and_without_the_twin():
  tokenizer = text.TextTokenizer()
  for _, line in zip(range(300), text_corpus.corpus(), strict=False):
    np.testing.assert_array_equal(
      tokenizer._encode_escaped(line), tokenizer.encode(line)
    )


def test_special_tokens_that_the_vocabulary_splits_stay_split(tmp_path):
  """They stand in the vocabulary, but are no tokens of their own."""
  model = tokenizers.Tokenizer.from_str(text.TextTokenizer()._model.to_str())
  values = json.loads(model.to_str())
  values["added_tokens"] = [
    t for t in values["added_tokens"] if t["content"] != "<mask>"
  ]
  (tmp_path / "x.json").write_text(json.dumps(values))
  tokenizer = text.TextTokenizer(tmp_path / "x.json")
  typed = tokenizer.escape("a <mask> <img>")
  both = "<|im_start|>" + typed + "<mask>"
  assert tokenizer.token_ids.mask not in tokenizer.encode(both)
  assert _controls(tokenizer, tokenizer.encode(both)) == [
    tokenizer.token_ids.im_start
  ]
