"""Trains the shipped text tokenizer: python -m argenseg_jax.data.text_corpus.

The corpus is what the small model reads and writes: the chat template, request
templates, generated requests and answers that describe their targets.
"""

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from argenseg_jax.data import chat, text
from argenseg_jax.data.ref_shapes import requests, scenes

_SCENES = 150
# The shipped file was trained on ref_shapes 1.2.0; other shares of requests
# would give checkpoints' words other ids.
_TRAIN = requests.Split(0, scenes.Style(), (0.77, 0.08, 0.15))
_SPLITS = requests.SPLITS | {"train": _TRAIN}
_TEMPLATES = ("referring", "semantic", "reasoning", "free")
_ANSWERS = (
  "Sure, the segmentation result: <mask>.",
  "There is no such thing.",
  "First <mask> and second <mask>.",
)


def corpus() -> Iterator[str]:
  """Texts to train on; the same on every call."""
  join = chat.EXPRESSION_JOINS["training"]
  for split in _SPLITS.values():
    for scene_id in range(_SCENES):
      for record in requests.draw_requests(
        split, scene_id, seed=0, image_side=32
      ):
        yield join(record["expressions"])
        if record["description"]:
          yield f"the {record['description']}<mask>"
  for _ in range(_SCENES):
    for role in ("system", "user", "assistant"):
      yield f"<|im_start|>{role}\n<|im_end|>\n"
    yield from (chat.REQUEST_TEMPLATES[name] for name in _TEMPLATES)
    yield from _ANSWERS


def train_text_tokenizer(
  texts: Iterable[str], vocab_size: int = 512
) -> tokenizers.Tokenizer:
  """Byte-level BPE over `texts`; any text can be encoded with it.

  Special tokens come first, `<pad>` being 0. `vocab_size` counts all of them.
  """
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=["<pad>", *text.SPECIAL_TOKENS.values()],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  return model


if __name__ == "__main__":
  train_text_tokenizer(corpus()).save(str(text.SHIPPED))
