import json
import pickle

import numpy as np
import pytest
import tokenizers

from argenseg_jax.data import chat, text, text_corpus
from argenseg_jax.data.errors import DataError
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET


@pytest.fixture(scope="module")
def tokenizer():
  return text.TextTokenizer()


def test_shipped_vocabulary(tokenizer):
  ids = tokenizer.token_ids
  assert ids.pad == 0
  assert ids.bos is None
  assert 400 <= ids.first_code <= 512
  for field, token in text.SPECIAL_TOKENS.items():
    assert tokenizer.encode(token).tolist() == [getattr(ids, field)]


@pytest.mark.parametrize(
  "said",
  [
    "the small red square left of the circle",
    "你是书生·万象，",
    " two  spaces\n\ttabs",
    "ёж 🦔 naïve",
    "<|im_start|>user\n<img></img>",
    "",
  ],
)
def test_any_text_survives(tokenizer, said):
  ids = tokenizer.encode(said)
  assert tokenizer.decode(ids, keep_special=True) == said


@pytest.mark.parametrize("special", [True, False])
def test_runs_of_slots_encode_as_one_by_one(special):
  shipped = text.TextTokenizer()
  model = tokenizers.Tokenizer.from_str(shipped._model.to_str())
  if not special:  # Words like others: they are split, and differently so.
    words = json.loads(model.to_str())
    words["added_tokens"] = [
      t for t in words["added_tokens"] if t["content"] not in text._SLOTS
    ]
    model = tokenizers.Tokenizer.from_str(json.dumps(words))
    shipped._model = model
  picture, code = text._SLOTS
  for said in (
    f"<img>{picture * 7}</img>\n a cup",
    f" {picture}{code * 3} {picture * 2}{code}x{code * 680}<ge_end>",
    picture,
  ):
    expected = model.encode(said, add_special_tokens=False).ids
    assert shipped.encode(said).tolist() == expected
    assert not shipped.encode(said).flags.writeable


def test_requests_are_short(tokenizer):
  assert len(tokenizer.encode("the small red square left of the circle")) == 8
  # So is what surrounds a request: 11 positions beside the image's own.
  turns = [{"from": "human", "value": "<image>\n"}]
  prompt = chat.chat_prompt(tokenizer, turns, image_tokens=[64])
  assert len(chat.encode_prompt(tokenizer, prompt)) == 64 + 11


def test_decoding_leaves_out_codes_and_special_tokens(tokenizer):
  ids = tokenizer.encode("Sure: <ge_start><MASK_CONTEXT><ge_end>.").tolist()
  ids.insert(3, tokenizer.token_ids.first_code + 5)
  assert tokenizer.decode(ids) == "Sure: ."


def test_the_shipped_file_is_what_the_function_trains():
  trained = text_corpus.train_text_tokenizer(text_corpus.corpus())
  assert trained.to_str(pretty=True) == text.SHIPPED.read_text()


def test_copies_encode_alike(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.token_ids == tokenizer.token_ids
  assert copy.fingerprint == tokenizer.fingerprint
  np.testing.assert_array_equal(
    copy.encode("a ring"), tokenizer.encode("a ring")
  )


def test_a_file_without_the_special_tokens_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text("{}")
  with pytest.raises(DataError, match=r"cannot load text tokenizer .*json"):
    text.TextTokenizer(path)
  with pytest.raises(DataError, match="has no token <img>"):
    text.TextTokenizer.from_characters(
      {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    )


def test_templates():
  said = ["a cat", "the cat"]
  assert chat.request_text("referring", said) == (
    "<image>\n Given the following instructions: a cat, the cat; please "
    "perform referring segmentation on this image."
  )
  assert chat.request_text("free", said, "evaluation") == (
    "<image>\n a cat. the cat."
  )
  assert chat.request_text("semantic", ["{}"]) == (
    "<image>\n Please segment {} in this image."
  )


TURNS = (
  {"from": "human", "value": "<image>\nthe ring"},
  {"from": "gpt", "value": "<mask>."},
  {"from": "human", "value": "and"},
  {"from": "gpt", "value": "<mask>"},
)


def test_a_row_predicts_every_code_from_the_position_before(tokenizer):
  ids = tokenizer.token_ids
  sample = chat.tokenize_chat(tokenizer, TURNS, image_tokens=[4], num_codes=5)
  row = chat.text_row((sample,), 80, ids)
  starts = np.flatnonzero(row.tokens == ids.ge_start)
  assert len(starts) == 2
  for start in starts:
    np.testing.assert_array_equal(
      row.tokens[start : start + 6],
      [ids.ge_start, *[ids.mask_context] * 4, ids.ge_end],
    )
    assert (row.targets[start : start + 5] == CODE_TARGET).all()
    # The answer goes on after <ge_end>, which itself is never predicted.
    assert row.targets[start + 5] == row.tokens[start + 6]
  assert (row.targets == CODE_TARGET).sum() == 10
  assert not (row.targets == ids.ge_end).any()
  learned = row.targets >= 0
  np.testing.assert_array_equal(
    row.targets[learned], np.roll(row.tokens, -1)[learned]
  )
  prompt = chat.chat_prompt(tokenizer, TURNS[:1], image_tokens=[4])
  np.testing.assert_array_equal(
    row.tokens[row.is_prompt], chat.encode_prompt(tokenizer, prompt)
  )
  np.testing.assert_array_equal(
    row.positions[: len(sample)], np.arange(len(sample))
  )
  assert (row.segment_ids == (np.arange(80) < len(sample))).all()
  assert (row.targets[len(sample) - 1 :] == IGNORE_TARGET).all()


def test_packed_samples_stay_apart(tokenizer):
  ids = tokenizer.token_ids
  one = chat.tokenize_chat(tokenizer, TURNS, image_tokens=[4], num_codes=5)
  two = chat.tokenize_chat(tokenizer, TURNS[2:], num_codes=3)
  both = chat.text_row((one, two), 120, ids)
  alone = [chat.text_row((s,), len(s), ids) for s in (one, two)]
  total = len(one) + len(two)
  for field in ("tokens", "targets", "positions", "is_prompt"):
    np.testing.assert_array_equal(
      getattr(both, field)[:total],
      np.concatenate([getattr(r, field) for r in alone]),
    )
  np.testing.assert_array_equal(
    both.segment_ids,
    np.repeat([1, 2, 0], [len(one), len(two), 120 - total]),
  )
  with pytest.raises(DataError, match=f"{total} tokens does not fit"):
    chat.text_row((one, two), total - 1, ids)


def test_a_system_turn_replaces_the_system_message(tokenizer):
  system = {"from": "system", "value": "Be brief."}
  plain = chat.chat_prompt(tokenizer, TURNS[2:3])
  assert plain.startswith("<|im_start|>user")
  given = chat.chat_prompt(
    tokenizer, (system, *TURNS[2:3]), system_message="other"
  )
  assert given == chat.chat_prompt(
    tokenizer, TURNS[2:3], system_message="Be brief."
  )
  assert given == "<|im_start|>system\nBe brief.<|im_end|>\n" + plain


def test_an_image_that_nobody_placed_goes_first(tokenizer):
  bare = [{"from": "human", "value": "What is this?"}]
  placed = [{"from": "human", "value": "<image>\nWhat is this?"}]
  assert chat.chat_prompt(
    tokenizer, bare, image_tokens=[3]
  ) == chat.chat_prompt(tokenizer, placed, image_tokens=[3])


@pytest.mark.parametrize(
  ("turns", "message"),
  [
    ([], "must begin with a human turn"),
    (TURNS[1:], "must begin with a human turn"),
    ([{"from": "human", "value": "<image><image>"}], "2 <image> for 1"),
    ([*TURNS, {"from": "cat", "value": ""}], "a turn from 'cat'"),
  ],
)
def test_bad_conversations(tokenizer, turns, message):
  with pytest.raises(DataError, match=message):
    chat.tokenize_chat(tokenizer, turns, image_tokens=[2], num_codes=3)


def _words(tokenizer, tokens):
  return tokenizer.decode(tokens.ids[tokens.requests > 0])


@pytest.mark.parametrize("length", [60, 41, 30])
def test_a_long_request_is_cut_never_its_codes(length):
  tokenizer = text.TextTokenizer()
  special = tokenizer.token_ids
  words = " ".join(f"w{i}" for i in range(40))
  whole = chat.tokenize_chat(
    tokenizer,
    _chat(f"<image>\n{words}", "<mask>"),
    image_tokens=(4,),
    num_codes=5,
  )
  assert _words(tokenizer, whole).strip() == words
  cut = whole.cut(length, special)
  assert len(cut) == length
  assert _words(tokenizer, whole).startswith(_words(tokenizer, cut))
  outside = whole.requests == 0
  np.testing.assert_array_equal(cut.ids[cut.requests == 0], whole.ids[outside])
  np.testing.assert_array_equal(
    cut.labels[cut.requests == 0], whole.labels[outside]
  )
  shortest = np.count_nonzero(outside) + 1
  assert len(whole.cut(shortest, special)) == shortest
  with pytest.raises(DataError, match="does not fit sequence_length"):
    whole.cut(shortest - 1, special)
  assert whole.cut(len(whole), special) is whole


def test_a_long_answer_loses_its_end_and_a_mask_its_longest_request():
  tokenizer = text.TextTokenizer()
  special = tokenizer.token_ids
  said = " ".join(f"w{i}" for i in range(40))
  answered = chat.tokenize_chat(tokenizer, _chat("what?", said))
  cut = answered.cut(30, special)
  np.testing.assert_array_equal(cut.ids, answered.ids[:30])
  asked = _chat("left " * 30, "<mask>") + _chat("and right " * 10, "<mask>")
  two = chat.tokenize_chat(tokenizer, asked, num_codes=5)
  cut = two.cut(len(two) - 12, special)
  counts = np.bincount(two.requests) - np.bincount(cut.requests)
  assert counts.tolist() == [0, 12, 0]
  assert (cut.ids == special.ge_end).sum() == 2


def _chat(asked, answer):
  return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
