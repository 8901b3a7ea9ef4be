"""Text: the text tokenizer, the chat template, request templates, rows.

Equal, id by id and label by label, to what the authors' `internvl2_5`
preprocessing gives (see tests/golden/preprocess).
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, pre_tokenizers, processors

from argenseg_jax.config import TokenIds
from argenseg_jax.data.errors import DataError
from argenseg_jax.runtime.paths import Path, as_path
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET

SHIPPED = pathlib.Path(__file__).parent / "tokenizer.json"
# Of one conversation; longer ones are refused before they are tokenised.
MAX_CHARACTERS = 1 << 18
_MAX_CACHED = 2048  # Characters of a text whose ids are remembered.
IGNORE_LABEL = -100  # The authors' mark for "no loss here".

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
# They stand side by side by the hundred.
_SLOTS = tuple(SPECIAL_TOKENS[f] for f in ("img_context", "mask_context"))
_RUN_OF_SLOTS = re.compile("|".join(f"(?:{re.escape(s)})+" for s in _SLOTS))
# First of these that the vocabulary has: ours, InternLM2's, Qwen2's.
_PAD_TOKENS = ("<pad>", "</s>", "<|endoftext|>")

INTERNVL_SYSTEM_MESSAGE = (
  "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
  "联合开发的多模态大语言模型。"
)

# What is asked around the expressions: every kind of request, in one place.
# Free wording takes "free". Those of the first three are the authors'.
REQUEST_TEMPLATES = {
  "referring": (
    "<image>\n Given the following instructions: {}; please perform referring "
    "segmentation on this image."
  ),
  "semantic": "<image>\n Please segment {} in this image.",
  "reasoning": (
    "<image>\n Please perform instance segmentation following the instructions "
    "below: {}."
  ),
  "instance": "<image>\n Please segment each {} in this image, one by one.",
  # "the defect", "the scratch on the metal".
  "anomaly": "<image>\n Please segment {} in this image, if there is any.",
  # Interactive: thousandths of the picture, [[x, y]] or [[x1, y1, x2, y2]].
  "point": "<image>\n Please segment the object at point {} in this image.",
  "box": "<image>\n Please segment the object in box {} in this image.",
  "drawn": "<image>\n Please segment the object marked in red in this image.",
  "generation": "Please generate an image: {}",
  "question": (
    "<image>\n{}\nAnswer the question using a single word or phrase."
  ),
  "choice": (
    "<image>\n{}\nAnswer with the option's letter from the given choices "
    "directly."
  ),
  "caption": "<image>\nDescribe this image in one sentence.",
  "free": "<image>\n{}",
}
# How the authors put several expressions of one object side by side: in
# training "a, b", in evaluation " a. b.".
EXPRESSION_JOINS = {
  "training": lambda expressions: ", ".join(expressions),
  "evaluation": lambda expressions: "".join(f" {e}." for e in expressions),
}


def request_text(
  template: str, expressions: Sequence[str], join: str = "training"
) -> str:
  """Puts expressions into a request template; both are named in the tables."""
  return REQUEST_TEMPLATES[template].replace(
    "{}", EXPRESSION_JOINS[join](expressions)
  )


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

  def _set(self, model, name: str, first_code: int | None) -> None:
    self._model = model
    self._first_code = first_code
    self.name = name
    ids = {f: model.token_to_id(t) for f, t in SPECIAL_TOKENS.items()}
    pads = [model.token_to_id(t) for t in _PAD_TOKENS]
    ids["pad"] = next((i for i in pads if i is not None), None)
    for field, found in ids.items():
      if found is None:
        text = SPECIAL_TOKENS.get(field, " or ".join(_PAD_TOKENS))
        raise DataError(f"text tokenizer {name} has no token {text}.")
    prefix = model.encode("", add_special_tokens=True).ids
    if first_code is None:
      first_code = model.get_vocab_size()
    self.token_ids = TokenIds(
      **ids, first_code=first_code, bos=prefix[0] if prefix else None
    )
    # Requests repeat; a dictionary look-up is quicker than BPE.
    self._encode = functools.lru_cache(maxsize=1 << 16)(self._encode_uncached)

  def require(self, ids: TokenIds) -> None:
    """Raises DataError where a model has other ids for the special tokens."""
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
    array.flags.writeable = False
    return array

  def encode(self, text: str) -> Int[np.ndarray, "t"]:
    """Ids of a text, special tokens in it recognised, nothing prepended.

    The array is shared between calls and cannot be written to.
    """
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

  def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
    """Text of ids; image codes are left out, and so are special tokens unless
    `keep_special`."""
    text = [int(i) for i in ids if 0 <= i < self.token_ids.first_code]
    return self._model.decode(text, skip_special_tokens=not keep_special)

  @property
  def fingerprint(self) -> str:
    """Changes when the vocabulary or the rules do."""
    text = self._model.to_str() + str(self._first_code)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Tokenized:
  """A conversation as ids, and what is to be learned at each of them.

  Attributes:
    ids: int32 [t].
    labels: int32 [t]; the id itself in answers, `IGNORE_LABEL` elsewhere, and
      the id of `<MASK_CONTEXT>` where an image code is due: on the slots and
      on `<ge_end>`, whose place carries the last code.
    requests: int32 [t]; which human turn, from 1 on, the words at a position
      belong to, 0 for everything that is not such a word.
  """

  ids: Int[np.ndarray, "t"]
  labels: Int[np.ndarray, "t"]
  requests: Int[np.ndarray, "t"]

  def __len__(self) -> int:
    return len(self.ids)

  def padded(self, length: int, pad_id: int) -> "Tokenized":
    """Padded on the right, or cut, to `length`."""
    extra = max(length - len(self), 0)
    return Tokenized(
      np.pad(self.ids, (0, extra), constant_values=pad_id)[:length],
      np.pad(self.labels, (0, extra), constant_values=IGNORE_LABEL)[:length],
      np.pad(self.requests, (0, extra))[:length],
    )

  def cut(self, length: int, token_ids: TokenIds) -> "Tokenized":
    """At most `length` positions, with all pictures and image codes.

    The end goes if that leaves something to learn and takes no picture and no
    code away; else the longest request loses its last words, but not all.

    Raises:
      DataError: no such cut is long enough.
    """
    excess = len(self) - length
    if excess <= 0:
      return self
    kept = np.ones(len(self), np.bool_)
    whole = _of_picture(self.ids, token_ids)
    whole |= self.labels == token_ids.mask_context
    if (self.labels[:length] != IGNORE_LABEL).any() and not whole[
      length:
    ].any():
      kept[length:] = False
    else:
      sizes = np.bincount(self.requests)[1:]
      if not len(sizes) or sizes.max() <= excess:
        raise DataError(
          f"a conversation of {len(self)} tokens does not fit sequence_length "
          f"{length}, however its longest request is cut."
        )
      words = np.flatnonzero(self.requests == sizes.argmax() + 1)
      kept[words[-excess:]] = False
    return Tokenized(self.ids[kept], self.labels[kept], self.requests[kept])

  def position_ids(self, pad_id: int) -> Int[np.ndarray, "t"]:
    """Positions as the authors count them: padding does not, and has 1."""
    real = self.ids != pad_id
    return np.where(real, np.cumsum(real) - 1, 1)


def tokenize_chat(
  tokenizer: TextTokenizer,
  turns: Sequence[Mapping[str, str]],
  *,
  image_tokens: Sequence[int] = (),
  num_codes: int = 0,
  system_message: str = "",
) -> Tokenized:
  """Training ids and labels of a conversation.

  Args:
    tokenizer: the text tokenizer.
    turns: {"from": "system" | "human" | "gpt", "value": text}; a system turn
      may only come first, and replaces `system_message`.
    image_tokens: vision embeddings of each image; `<image>` in human turns
      takes them in order. Images nobody placed go before the first human turn.
    num_codes: image codes of a mask; each `<mask>` of an answer becomes
      `<ge_start>`, num_codes - 1 slots, `<ge_end>`.
    system_message: an empty one leaves the system block out.

  Raises:
    DataError: roles out of order or `<image>` without an image.
  """
  special = tokenizer.token_ids
  pieces = [_bos(tokenizer)]
  labels = [np.full(len(pieces[0]), IGNORE_LABEL, np.int32)]
  requests = [np.zeros(len(pieces[0]), np.int32)]
  assistant = len(tokenizer.encode("<|im_start|>assistant\n"))
  user = len(tokenizer.encode("<|im_start|>user\n"))
  human_turns = 0
  for role, text in _chat_blocks(turns, image_tokens, system_message):
    if role == "gpt":
      slots = SPECIAL_TOKENS["mask_context"] * (num_codes - 1)
      text = text.replace("<mask>", f"<ge_start>{slots}<ge_end>")
    ids = tokenizer.encode(text)
    label = np.full(len(ids), IGNORE_LABEL, np.int32)
    if role == "gpt":
      label[assistant:-1] = ids[assistant:-1]  # Not the final newline.
      label[label == special.ge_end] = special.mask_context
    request = np.zeros(len(ids), np.int32)
    if role == "human":
      human_turns += 1
      end = np.flatnonzero(ids == special.im_end)[-1]
      request[user:end] = human_turns
      request[_of_picture(ids, special)] = 0
    pieces.append(ids)
    labels.append(label)
    requests.append(request)
  return Tokenized(*map(np.concatenate, (pieces, labels, requests)))


def _of_picture(ids: np.ndarray, special: TokenIds) -> np.ndarray:
  """Which tokens stand for a picture, bool."""
  return (
    (ids == special.img_context)
    | (ids == special.img_start)
    | (ids == special.img_end)
  )


def chat_prompt(
  turns: Sequence[Mapping[str, str]],
  *,
  image_tokens: Sequence[int] = (),
  system_message: str = "",
  answer_prefix: str = "",
) -> str:
  """The text up to where the model answers; arguments as `tokenize_chat`.

  Args:
    answer_prefix: the beginning of the answer, to be forced.
  """
  blocks = _chat_blocks(turns, image_tokens, system_message)
  text = "".join(block for _, block in blocks)
  return f"{text}<|im_start|>assistant\n{answer_prefix}"


def encode_prompt(
  tokenizer: TextTokenizer, prompt: str
) -> Int[np.ndarray, "t"]:
  """Ids of a `chat_prompt`, with `<s>` where the text tokenizer wants it."""
  return np.concatenate((_bos(tokenizer), tokenizer.encode(prompt)))


def _bos(tokenizer: TextTokenizer) -> np.ndarray:
  bos = tokenizer.token_ids.bos
  return np.array([] if bos is None else [bos], np.int32)


def _chat_blocks(
  turns: Sequence[Mapping[str, str]],
  image_tokens: Sequence[int],
  system_message: str,
) -> list[tuple[str, str]]:
  """(role, text in the `internvl2_5` template) of each turn, images placed."""
  turns = [(t["from"], t["value"]) for t in turns]
  if turns and turns[0][0] == "system":
    system_message = turns[0][1]
    turns = turns[1:]
  length = len(system_message) + sum(len(text) for _, text in turns)
  if length > MAX_CHARACTERS:
    raise DataError(
      f"a conversation of {length} characters is too long; at most "
      f"{MAX_CHARACTERS} are read."
    )
  try:
    "".join((system_message, *(text for _, text in turns))).encode()
  except UnicodeEncodeError as error:
    raise DataError(
      f"a conversation holds {error.object[error.start]!r}, half a character."
    ) from error
  human = [text for role, text in turns if role == "human"]
  if not turns or turns[0][0] != "human":
    raise DataError("a conversation must begin with a human turn.")
  placed = sum(text.count("<image>") for text in human)
  if image_tokens and placed > len(image_tokens):
    raise DataError(
      f"a conversation has {placed} <image> for {len(image_tokens)} pictures."
    )
  missing = "<image>\n" * (len(image_tokens) - placed)
  turns[0] = ("human", missing + turns[0][1])
  blocks = []
  if system_message:
    blocks.append(
      ("system", f"<|im_start|>system\n{system_message}<|im_end|>\n")
    )
  counts = iter(image_tokens)
  for role, text in turns:
    if role == "human":
      for _ in range(text.count("<image>") if image_tokens else 0):
        context = SPECIAL_TOKENS["img_context"] * next(counts)
        text = text.replace("<image>", f"<img>{context}</img>", 1)
      blocks.append((role, f"<|im_start|>user\n{text}<|im_end|>\n"))
    elif role == "gpt":
      blocks.append((role, f"<|im_start|>assistant\n{text}<|im_end|>\n"))
    else:
      raise DataError(f"a conversation has a turn from {role!r}.")
  return blocks


@dataclasses.dataclass(frozen=True)
class TextRow:
  """The text fields of one row of a `types.Batch`."""

  tokens: Int[np.ndarray, "t"]
  targets: Int[np.ndarray, "t"]
  positions: Int[np.ndarray, "t"]
  segment_ids: Int[np.ndarray, "t"]
  is_prompt: np.ndarray  # bool [t]


def padding_row(length: int) -> TextRow:
  """A row of `length` positions that holds no conversation."""
  return TextRow(
    tokens=np.zeros(length, np.int32),
    targets=np.full(length, IGNORE_TARGET, np.int32),
    positions=np.zeros(length, np.int32),
    segment_ids=np.zeros(length, np.int32),
    is_prompt=np.zeros(length, np.bool_),
  )


def text_row(
  samples: Sequence[Tokenized], length: int, token_ids: TokenIds
) -> TextRow:
  """Packs conversations one after another into a row of `length` positions.

  Each conversation gets its own segment id, from 1 on, and positions from 0.

  Raises:
    DataError: they do not fit.
  """
  total = sum(len(s) for s in samples)
  if total > length:
    raise DataError(
      f"a conversation of {total} tokens does not fit sequence_length {length}."
    )
  row = padding_row(length)
  start = 0
  for segment, sample in enumerate(samples, 1):
    stop = start + len(sample)
    row.tokens[start:stop] = sample.ids
    row.positions[start:stop] = np.arange(len(sample))
    row.segment_ids[start:stop] = segment
    answered = np.flatnonzero(sample.labels != IGNORE_LABEL)
    first = answered[0] if len(answered) else len(sample)
    row.is_prompt[start : start + first] = True
    # One-step shift: a position predicts what the next one is labelled.
    due = sample.labels[1:]
    target = np.where(due == IGNORE_LABEL, IGNORE_TARGET, due)
    target[due == token_ids.mask_context] = CODE_TARGET
    row.targets[start : stop - 1] = target
    start = stop
  return row
