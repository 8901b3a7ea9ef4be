"""The text tokenizer and its special tokens.

What users type is text: it never becomes a special token. `escape` marks it,
and `encode` reads such text with a twin of the tokenizer that gives the special
tokens names which nobody can type.
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, pre_tokenizers, processors

from argenseg_jax.data.errors import DataError
from argenseg_jax.model_config import TokenIds
from argenseg_jax.runtime.paths import Path, as_path

SHIPPED = pathlib.Path(__file__).parent / "tokenizer.json"
_MAX_CACHED = 2048  # Characters of a text whose ids are remembered.

# Field of `TokenIds` -> the token's text.
SPECIAL_TOKENS = {
  "im_start": "<|im_start|>",
  "im_end": "<|im_end|>",
  "img_start": "<img>",
  "img_end": "</img>",
  "img_context": "<IMG_CONTEXT>",
  "mask": "<mask>",
  "ge_start": "<ge_start>",
  "ge_end": "<ge_end>",
  "mask_context": "<MASK_CONTEXT>",
}
# Those that ARGenSeg adds to InternVL's vocabulary, in the order of their ids.
ADDED_TOKENS = tuple(
  SPECIAL_TOKENS[f] for f in ("mask", "ge_start", "ge_end", "mask_context")
)
# InternVL's markup of phrases and boxes: special tokens, but part of what
# people and models write.
MARKUP = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_UNKNOWN = "<unk>"
_BARRED = re.compile(r"<\|.*\|>", re.DOTALL)
# In text of users, after the first character of what would otherwise be read as
# a special token or placeholder. No text has it: it is no character.
ESCAPE = "\ufdd0"
_NO_CHARACTERS = re.compile("[\ufdd0-\ufdef]")
# They stand side by side by the hundred.
_SLOTS = tuple(SPECIAL_TOKENS[f] for f in ("img_context", "mask_context"))
_RUN_OF_SLOTS = re.compile("|".join(f"(?:{re.escape(s)})+" for s in _SLOTS))
# First of these that the vocabulary has: ours, InternLM2's, Qwen2's.
_PAD_TOKENS = ("<pad>", "</s>", "<|endoftext|>")


def escape(text: str, tokens: re.Pattern[str]) -> str:
  """The text, marked so that none of `tokens` is found in it."""
  return tokens.sub(lambda found: _escaped(found[0]), text)


def unescape(text: str) -> str:
  """The text as its user typed it."""
  return text.replace(ESCAPE, "")


def _escaped(token: str) -> str:
  return token[0] + ESCAPE + token[1:]


class _Twin(NamedTuple):
  """A tokenizer whose special tokens have names that nobody can type.

  Attributes:
    model: the tokenizer.
    names: text of a special token -> its name here.
    ids: int32 [v], the id that each of its ids stands for; -1 for the token
      that stands where a text is broken and is left out.
    forbidden: bool [v], ids of special tokens that no text may get.
  """

  model: tokenizers.Tokenizer
  names: dict[str, str]
  ids: Int[np.ndarray, "v"]
  forbidden: np.ndarray


class TextTokenizer:
  """A `tokenizer.json` and the ids of its special tokens.

  Args:
    path: a file of the `tokenizers` library; None takes the small byte-level
      BPE that is shipped.
    first_code: id of code 0; by default the codes follow the last text token.

  Raises:
    DataError: not such a file, or a special token is missing from it.
  """

  def __init__(
    self,
    path: str | Path | None = None,
    *,
    first_code: int | None = None,
  ):
    path = SHIPPED if path is None else as_path(path)
    try:
      model = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # The library raises bare Exceptions.
      raise DataError(f"cannot load text tokenizer {path}: {error}.") from error
    self._set(model, str(path), first_code)

  @classmethod
  def from_characters(
    cls, vocabulary: Mapping[str, int], *, first_code: int | None = None
  ) -> "TextTokenizer":
    """The recorders' toy: special strings first, then one token a character.

    Unknown characters become `<unk>`, and `<s>` stands before every text when
    the vocabulary has one.
    """
    model = tokenizers.Tokenizer(
      models.WordLevel(dict(vocabulary), unk_token="<unk>")
    )
    model.pre_tokenizer = pre_tokenizers.Split(
      tokenizers.Regex(r"[\s\S]"), "isolated"
    )
    model.add_special_tokens([t for t in vocabulary if len(t) > 1])
    if "<s>" in vocabulary:
      model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
      )
    self = cls.__new__(cls)
    self._set(model, "the vocabulary given", first_code)
    return self

  def _set(
    self, model: tokenizers.Tokenizer, name: str, first_code: int | None
  ) -> None:
    self._model = model
    self._first_code = first_code
    self.name = name
    texts: dict[str, tuple[str, ...]] = {
      field: (text,) for field, text in SPECIAL_TOKENS.items()
    }
    texts["pad"] = _PAD_TOKENS
    ids: dict[str, int] = {}
    for field, alternatives in texts.items():
      found = map(model.token_to_id, alternatives)
      first = next((i for i in found if i is not None), None)
      if first is None:
        text = " or ".join(alternatives)
        raise DataError(f"text tokenizer {name} has no token {text}.")
      ids[field] = first
    prefix = model.encode("", add_special_tokens=True).ids
    if first_code is None:
      first_code = model.get_vocab_size()
    self.token_ids = TokenIds(
      **ids, first_code=first_code, bos=prefix[0] if prefix else None
    )
    # Requests repeat; a dictionary look-up is quicker than BPE.
    self._encode = functools.lru_cache(maxsize=1 << 16)(self._encode_uncached)
    # Longest first: the first alternative that fits is taken.
    controls = sorted(_controls(model), key=len, reverse=True)
    self._control = re.compile("|".join(map(re.escape, controls)))
    # What stands for characters that the vocabulary lacks may come from text.
    control_ids = [model.token_to_id(t) for t in controls if t != _UNKNOWN]
    self._control_ids = np.array(control_ids, np.int32)
    self.__dict__.pop("_twin", None)

  def require(self, ids: TokenIds) -> None:
    """Raises DataError where a model has other ids for the special tokens."""
    size = self._model.get_vocab_size()
    if size > ids.first_code:
      raise DataError(
        f"text tokenizer {self.name} has {size} tokens, but the model's image "
        f"codes begin at id {ids.first_code}; give the tokenizer.json of this "
        "model."
      )
    for field, text in SPECIAL_TOKENS.items():
      mine, wanted = getattr(self.token_ids, field), getattr(ids, field)
      if mine != wanted:
        raise DataError(
          f"text tokenizer {self.name} gives {text} the id {mine}, the model "
          f"has it at {wanted}; give the tokenizer.json of this model."
        )
    if self.token_ids.bos != ids.bos:
      raise DataError(
        f"text tokenizer {self.name} puts {self.token_ids.bos} before a text, "
        f"the model was made for {ids.bos}; correct its post_processor."
      )

  def __getstate__(self):
    return (self._model.to_str(), self.name, self._first_code)

  def __setstate__(self, state):
    text, name, first_code = state
    self._set(tokenizers.Tokenizer.from_str(text), name, first_code)

  def _encode_uncached(self, text: str) -> Int[np.ndarray, "t"]:
    ids = self._model.encode(text, add_special_tokens=False).ids
    array = np.array(ids, np.int32)
    found = np.count_nonzero(np.isin(array, self._control_ids))
    if found and found > len(self._control.findall(text)):
      # Some normalizers make special tokens of other characters.
      array = self._encode_escaped(text)
    array.flags.writeable = False
    return array

  def _encode_escaped(self, text: str) -> Int[np.ndarray, "t"]:
    twin, parts, start = self._twin, [], 0
    for found in self._control.finditer(text):
      # One that is no token of its own is read as its characters.
      name = twin.names.get(found[0], found[0])
      parts += [_typed(text[start : found.start()]), name]
      start = found.end()
    parts.append(_typed(text[start:]))
    ids = twin.model.encode("".join(parts), add_special_tokens=False).ids
    if twin.forbidden[ids].any():
      raise DataError(
        f"text tokenizer {self.name} reads {unescape(text)[:80]!r} as special "
        "tokens; leave them out of the text."
      )
    array = twin.ids[ids]
    array = array[array >= 0]
    array.flags.writeable = False
    return array

  @functools.cached_property
  def _twin(self) -> _Twin:
    values = json.loads(self._model.to_str())
    added, values["added_tokens"] = values["added_tokens"], []
    twin = tokenizers.Tokenizer.from_str(json.dumps(values))
    # Ids may have gaps.
    size = max(twin.get_vocab().values(), default=-1) + 1
    controls = set(_controls(self._model))
    names, real = {}, {}
    for number, entry in enumerate(added):
      name = token = entry["content"]
      options = {k: entry[k] for k in ("lstrip", "rstrip", "special")}
      if token in controls:
        name = names[token] = f"\ufdd1{number}\ufdd2"
        made = tokenizers.AddedToken(name, normalized=False, **options)
      else:
        options |= {k: entry[k] for k in ("single_word", "normalized")}
        made = tokenizers.AddedToken(token, **options)
      twin.add_tokens([made])
      real[name] = self._model.token_to_id(token)
    twin.add_tokens([tokenizers.AddedToken(_BREAK, normalized=False)])
    real[_BREAK] = -1
    ids = np.arange(max(twin.get_vocab().values()) + 1, dtype=np.int32)
    forbidden = np.zeros(len(ids), np.bool_)
    own = self._control_ids[self._control_ids < size]
    forbidden[own] = True
    for name, to in real.items():
      ids[twin.token_to_id(name)] = to
    return _Twin(twin, names, ids, forbidden)

  def escape(self, text: str, *, keep: Collection[str] = ()) -> str:
    """A user's text, marked so that `encode` finds no special token in it.

    Args:
      text: as it was typed.
      keep: special tokens that are meant.
    """
    return self._control.sub(
      lambda found: found[0] if found[0] in keep else _escaped(found[0]), text
    )

  def encode(self, text: str) -> Int[np.ndarray, "t"]:
    """Ids of a text, nothing prepended.

    Special tokens in it are recognized, but for those that `escape` marked.
    The array is shared between calls and cannot be written to.

    Raises:
      DataError: the tokenizer makes special tokens of text that has none.
    """
    if ESCAPE in text:
      return self._encode_escaped(text)
    counts: list[int] = []

    def one_for_all(run: re.Match[str]) -> str:
      slot = next(s for s in _SLOTS if run[0].startswith(s))
      counts.append(len(run[0]) // len(slot))
      return slot

    short = _RUN_OF_SLOTS.sub(one_for_all, text)
    if len(short) > _MAX_CACHED:
      ids = self._encode_uncached(short)
    else:
      ids = self._encode(short)
    if short == text:
      return ids
    runs = ids == self.token_ids.img_context
    runs |= ids == self.token_ids.mask_context
    if np.count_nonzero(runs) != len(counts):  # It splits special tokens.
      return self._encode_uncached(text)
    repeats = np.ones(len(ids), np.int64)
    repeats[runs] = counts
    ids = np.repeat(ids, repeats)
    ids.flags.writeable = False
    return ids

  def decode(
    self,
    ids: Sequence[int] | Int[np.ndarray, "t"],
    *,
    keep_special: bool = False,
  ) -> str:
    """Text of ids; image codes are left out, and so are special tokens unless
    `keep_special`."""
    text = [int(i) for i in ids if 0 <= i < self.token_ids.first_code]
    return self._model.decode(text, skip_special_tokens=not keep_special)

  @property
  def fingerprint(self) -> str:
    """Changes when the vocabulary or the rules do."""
    text = self._model.to_str() + str(self._first_code)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_BREAK = "\ufdd3"


def _typed(text: str) -> str:
  """A part between special tokens, as the twin reads it."""
  parts = text.split(ESCAPE)
  return _BREAK.join(_NO_CHARACTERS.sub("", part) for part in parts)


def _controls(model: tokenizers.Tokenizer) -> list[str]:
  """Special tokens that text must never become."""
  added = model.get_added_tokens_decoder().values()
  # Some vocabularies do not mark all of theirs ("<|fim_prefix|>").
  found = {
    t.content for t in added if t.special or _BARRED.fullmatch(t.content)
  }
  found |= {
    t for t in SPECIAL_TOKENS.values() if model.token_to_id(t) is not None
  }
  return [t for t in found - set(MARKUP) if len(t) > 1]
