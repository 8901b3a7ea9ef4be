"""Chats as ids: the chat template, request templates, rows.

Equal, id by id and label by label, to what the authors' `internvl2_5`
preprocessing gives (see tests/golden/preprocess). What people typed is marked
(`text.escape`) where it enters: only `<image>` of a human turn and `<mask>` of
an answer mean more than their characters.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.text import SPECIAL_TOKENS, TextTokenizer, escape
from argenseg_jax.model_config import TokenIds
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET

IGNORE_LABEL = -100  # The authors' mark for "no loss here".
# Of one conversation; longer ones are refused before they are tokenized.
MAX_CHARACTERS = 1 << 18
IMAGE = "<image>"  # In a human turn.
MASK = SPECIAL_TOKENS["mask"]  # In an answer.
USER = "<|im_start|>user\n"  # How a turn begins.
ASSISTANT = "<|im_start|>assistant\n"
_PLACEHOLDERS = re.compile(f"{IMAGE}|{MASK}")

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
  # Interactive: thousandths of the image, [[x, y]] or [[x1, y1, x2, y2]].
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
  """Puts expressions into a request template; both are named in the tables.

  Placeholders within an expression are its text.
  """
  joined = EXPRESSION_JOINS[join](expressions)
  return REQUEST_TEMPLATES[template].replace("{}", as_text(joined))


def as_text(typed: str) -> str:
  """A user's words, marked so that no placeholder is found in them."""
  return escape(typed, _PLACEHOLDERS)


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
    """At most `length` positions, with all images and image codes.

    The end goes if that leaves something to learn and takes no image and no
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
      may only come first, and replaces `system_message`. Special tokens in a
      text are its characters.
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
  assistant = len(tokenizer.encode(ASSISTANT))
  user = len(tokenizer.encode(USER))
  human_turns = 0
  slots = SPECIAL_TOKENS["mask_context"] * (num_codes - 1)
  codes = f"{SPECIAL_TOKENS['ge_start']}{slots}{SPECIAL_TOKENS['ge_end']}"
  for role, text in _chat_blocks(
    tokenizer, turns, image_tokens, system_message
  ):
    if role == "gpt":
      text = text.replace(MASK, codes)
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
  """Which tokens stand for an image, bool."""
  return (
    (ids == special.img_context)
    | (ids == special.img_start)
    | (ids == special.img_end)
  )


def chat_prompt(
  tokenizer: TextTokenizer,
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
  blocks = _chat_blocks(tokenizer, turns, image_tokens, system_message)
  text = "".join(block for _, block in blocks)
  return f"{text}{ASSISTANT}{tokenizer.escape(answer_prefix)}"


def encode_prompt(
  tokenizer: TextTokenizer, prompt: str
) -> Int[np.ndarray, "t"]:
  """Ids of a `chat_prompt`, with `<s>` where the text tokenizer wants it."""
  return np.concatenate((_bos(tokenizer), tokenizer.encode(prompt)))


def _bos(tokenizer: TextTokenizer) -> np.ndarray:
  bos = tokenizer.token_ids.bos
  return np.array([] if bos is None else [bos], np.int32)


def _chat_blocks(
  tokenizer: TextTokenizer,
  turns: Sequence[Mapping[str, str]],
  image_tokens: Sequence[int],
  system_message: str,
) -> list[tuple[str, str]]:
  """(role, text in the `internvl2_5` template) of each turn, images placed."""
  said = [(t["from"], t["value"]) for t in turns]
  if said and said[0][0] == "system":
    system_message = said[0][1]
    said = said[1:]
  length = len(system_message) + sum(len(text) for _, text in said)
  if length > MAX_CHARACTERS:
    raise DataError(
      f"a conversation of {length} characters is too long; at most "
      f"{MAX_CHARACTERS} are read."
    )
  try:
    "".join((system_message, *(text for _, text in said))).encode()
  except UnicodeEncodeError as error:
    raise DataError(
      f"a conversation contains {error.object[error.start]!r}, "
      "half a character."
    ) from error
  # Special tokens that somebody typed are text.
  keep = {"gpt": (MASK,), "human": (IMAGE,) if image_tokens else ()}
  system_message = tokenizer.escape(system_message)
  said = [(r, tokenizer.escape(t, keep=keep.get(r, ()))) for r, t in said]
  human = [text for role, text in said if role == "human"]
  if not said or said[0][0] != "human":
    raise DataError("a conversation must begin with a human turn.")
  placed = sum(text.count(IMAGE) for text in human)
  if image_tokens and placed > len(image_tokens):
    raise DataError(
      f"a conversation has {placed} <image> for {len(image_tokens)} images."
    )
  missing = f"{IMAGE}\n" * (len(image_tokens) - placed)
  said[0] = ("human", missing + said[0][1])
  blocks = []
  if system_message:
    blocks.append(
      ("system", f"<|im_start|>system\n{system_message}<|im_end|>\n")
    )
  counts = iter(image_tokens)
  for role, text in said:
    if role == "human":
      for _ in range(text.count(IMAGE) if image_tokens else 0):
        context = SPECIAL_TOKENS["img_context"] * next(counts)
        text = text.replace(IMAGE, f"<img>{context}</img>", 1)
      blocks.append((role, f"{USER}{text}<|im_end|>\n"))
    elif role == "gpt":
      blocks.append((role, f"{ASSISTANT}{text}<|im_end|>\n"))
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
    # One-step shift: a position predicts what the next one is labeled.
    due = sample.labels[1:]
    target = np.where(due == IGNORE_LABEL, IGNORE_TARGET, due)
    target[due == token_ids.mask_context] = CODE_TARGET
    row.targets[start : stop - 1] = target
    start = stop
  return row
