"""Prompts: ids of requests and conversations, left-padded to few lengths."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from argenseg_jax.config import DataConfig
from argenseg_jax.data import chat, text
from argenseg_jax.data.errors import DataError

BUCKET = 32  # Prompt lengths are padded to multiples of this.

Turns = Sequence[Mapping[str, str]]


class Prompt(NamedTuple):
  """What a model is asked.

  Attributes:
    ids: int32 [t], to the end of the answer's forced words.
    answer_length: how many of them, at the end, are those words.
    image_end: how many of them there are up to the end of the image; 0
      without one.
  """

  ids: np.ndarray
  answer_length: int
  image_end: int

  def after(self, start: int) -> "Prompt":
    """The prompt behind its first `start` ids."""
    return self._replace(ids=self.ids[start:], image_end=0)


class Padded(NamedTuple):
  """Prompts of a batch; t is one of few lengths."""

  tokens: Int[np.ndarray, "b t"]
  valid: Bool[np.ndarray, "b t"]
  is_answer: Bool[np.ndarray, "b t"]


def of_request(
  tokenizer: text.TextTokenizer,
  data: DataConfig,
  request: str,
  *,
  image_tokens: Sequence[int],
  answer_prefix: str = "",
  template: str = "",
) -> Prompt:
  """A request in the wording of the model's training.

  Args:
    tokenizer: of the model.
    data: has the request template and the system message.
    request: what to segment.
    image_tokens: as `of_turns`.
    answer_prefix: as `of_turns`.
    template: of `chat.REQUEST_TEMPLATES`, instead of the model's own.

  Raises:
    DataError: there is no such template.
  """
  template = template or data.request
  if template not in chat.REQUEST_TEMPLATES:
    raise DataError(
      f"no request template is named {template!r}; there are "
      f"{', '.join(chat.REQUEST_TEMPLATES)}."
    )
  asked = chat.request_text(template, [request], data.join)
  return of_turns(
    tokenizer,
    data,
    [{"from": "human", "value": asked}],
    image_tokens=image_tokens,
    answer_prefix=answer_prefix,
  )


def of_turns(
  tokenizer: text.TextTokenizer,
  data: DataConfig,
  turns: Turns,
  *,
  image_tokens: Sequence[int],
  answer_prefix: str = "",
) -> Prompt:
  """A conversation, up to where the model goes on.

  Masks of earlier answers (`<mask>`) are left out: prompts hold words and
  images only.

  Args:
    tokenizer: of the model.
    data: has the system message.
    turns: {"from": "human" or "gpt", "value": text}; the last is a human's.
    image_tokens: vision embeddings of each image.
    answer_prefix: the answer's first words, to be forced.

  Raises:
    DataError: turns out of order.
  """
  if not turns or turns[-1].get("from") != "human":
    raise DataError("a conversation must end with a human turn.")

  def prompt(answer_prefix):
    text = chat.chat_prompt(
      tokenizer,
      [_without_masks(turn) for turn in turns],
      image_tokens=image_tokens,
      system_message=data.system_message,
      answer_prefix=answer_prefix,
    )
    return chat.encode_prompt(tokenizer, text)

  asked = prompt("")
  # As one text, so that its words are those of training.
  ids = prompt(answer_prefix) if answer_prefix else asked
  ends = np.flatnonzero(asked == tokenizer.token_ids.img_end)
  return Prompt(
    ids=ids,
    answer_length=len(ids) - len(asked),
    image_end=int(ends[-1]) + 1 if ends.size else 0,
  )


def _without_masks(turn: Mapping[str, str]) -> Mapping[str, str]:
  """The words of a turn."""
  if turn["from"] != "gpt":
    return turn
  return {**turn, "value": turn["value"].replace(chat.MASK, "")}


def pad(prompts: Sequence[Prompt], pad_id: int) -> Padded:
  """Prompts of a batch, left-padded to a multiple of `BUCKET`."""
  tokens, valid = left_pad([prompt.ids for prompt in prompts], pad_id)
  is_answer = np.zeros_like(valid)
  for row, prompt in zip(is_answer, prompts, strict=True):
    row[len(row) - prompt.answer_length :] = True
  return Padded(tokens, valid, is_answer)


def left_pad(
  prompts: Sequence[np.ndarray], pad: int, *, at_least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as int32 [b t] and bool [b t], t in buckets."""
  length = bucket(max(at_least, *map(len, prompts)))
  tokens = np.full((len(prompts), length), pad, np.int32)
  valid = np.zeros((len(prompts), length), bool)
  for i, prompt in enumerate(prompts):
    tokens[i, length - len(prompt) :] = prompt
    valid[i, length - len(prompt) :] = True
  return tokens, valid


def bucket(length: int) -> int:
  """The padded length of a prompt."""
  return -(-length // BUCKET) * BUCKET
