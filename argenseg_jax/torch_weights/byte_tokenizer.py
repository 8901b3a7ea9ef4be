"""A text tokenizer for models that come without one, to try things out.

It puts the special tokens where the model has them and reads text byte by byte,
so that any text can be read. The model was not trained on such text.
"""

import string

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from argenseg_jax.data.text import SPECIAL_TOKENS
from argenseg_jax.model_config import TokenIds
from argenseg_jax.torch_weights.tensors import WeightsError

NAME = "bytes"  # In place of a file.
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# Where there is no room for all bytes: as many of these as fit, the commonest
# letters first, and one token for all others.
_COMMON = " etaoinshrdlucmfwypvbgkqjxz.," + string.digits + "'-?!:\n"
_UNKNOWN = "<unk>"


def make(ids: TokenIds) -> tokenizers.Tokenizer:
  """A tokenizer whose special tokens have the ids of a model.

  Raises:
    WeightsError: the vocabulary has no room for any text.
  """
  special = {text: getattr(ids, f) for f, text in SPECIAL_TOKENS.items()}
  special["</s>"] = ids.pad
  if ids.bos is not None:
    special["<s>"] = ids.bos
  free = [i for i in range(ids.first_code) if i not in special.values()]
  if len(free) >= len(_BYTES):
    vocabulary = dict(zip(_BYTES, free, strict=False))
    model = tokenizers.Tokenizer(
      models.BPE(_whole(vocabulary, special, free), [])
    )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    model.decoder = decoders.ByteLevel()
  elif len(free) > 1:
    vocabulary: dict[str, int] = dict(
      zip((_UNKNOWN, *_COMMON), free, strict=False)
    )
    model = tokenizers.Tokenizer(
      models.WordLevel(_whole(vocabulary, special, free), unk_token=_UNKNOWN)
    )
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Split(
      tokenizers.Regex(r"[\s\S]"), "isolated"
    )
    model.decoder = decoders.Fuse()
  else:
    raise WeightsError(
      f"the model's {ids.first_code} text tokens leave no room for text; give "
      "--tokenizer FILE."
    )
  model.add_special_tokens(
    [tokenizers.AddedToken(t, normalized=False) for t in special]
  )
  if ids.bos is not None:
    model.post_processor = processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", ids.bos)]
    )
  return model


def _whole(
  vocabulary: dict[str, int], special: dict[str, int], free: list[int]
) -> dict[str, int]:
  """All of it, without gaps: tokens that are added later come behind it."""
  unused = set(free) - set(vocabulary.values())
  return vocabulary | {f"<unused_{i}>": i for i in unused} | special
