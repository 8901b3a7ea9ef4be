"""Files of slow text tokenizers, as released folders have them."""

import io
import json
import pathlib
import random

WORDS = (
  *("the", "left", "man", "红", "色", "的", "猫", "左边", "aaa", "ab", "aba"),
  *("==", "---", "  ", "    ", "🐱", "é", "\t", "<mask", "[", "]", "x1", "<u>"),
)
SPARE = ("[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]")  # For what comes later.
SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>")


def train(**changes) -> bytes:
  """A SentencePiece BPE model with InternLM2's settings, or others."""
  import sentencepiece as spm

  rng = random.Random(0)
  if changes.get("vocab_size") == 450:
    lines = ["".join(rng.choices("ab ", k=60)) for _ in range(200)]
  else:
    lines = [
      "".join(rng.choice(WORDS) + rng.choice(("", " ")) for _ in range(30))
      for _ in range(300)
    ]
  settings = dict(
    model_type="bpe",
    vocab_size=600,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    character_coverage=0.99,
    hard_vocab_limit=False,
    user_defined_symbols=list(SPARE),
    minloglevel=2,
  )
  out = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=out, **(settings | changes)
  )
  return out.getvalue()


def write_folder(
  path: pathlib.Path, data: bytes, special: tuple[str, ...] = SPECIAL
) -> dict[str, int]:
  """As InternLM2's: two special tokens take the places of spare pieces, the
  others follow the vocabulary. Returns their ids."""
  import sentencepiece as spm

  model = spm.SentencePieceProcessor(model_proto=data)
  places = [*map(model.piece_to_id, SPARE)]
  places += range(model.vocab_size(), model.vocab_size() + len(special) - 2)
  ids = dict(zip(special, places, strict=True))
  control = {"<unk>": 0, "<s>": 1, "</s>": 2}
  (path / "tokenizer.model").write_bytes(data)
  (path / "tokenization_internlm2.py").write_text("raise SystemExit('run')\n")
  (path / "added_tokens.json").write_text(json.dumps(ids))
  decoder = {
    str(i): {
      "content": token,
      **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
      "special": True,
    }
    for token, i in (control | ids).items()
  }
  (path / "tokenizer_config.json").write_text(
    json.dumps({"added_tokens_decoder": decoder, "bos_token": "<s>"})
  )
  return control | ids
