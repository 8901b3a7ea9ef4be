"""The text tokenizer of a Hugging Face style folder as one `tokenizer.json`.

Nothing of the folder is run, and ids are those of the authors' slow tokenizer:
text between special tokens is encoded on its own.
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import (
  AddedToken,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from argenseg_jax.torch_weights import byte_tokenizer, sentencepiece_model
from argenseg_jax.torch_weights.sentencepiece_model import (
  PieceType,
  SentencePieceModel,
)
from argenseg_jax.torch_weights.tensors import WeightsError

_SPACE = "\u2581"  # SentencePiece's sign for a space.
# A user-defined piece stands in the vocabulary as one character of the last
# private plane, so that nothing merges with it.
_FIRST_STAND_IN = 0x100000
# How Qwen2 and Qwen3 cut text into words: a fact of their tokenizer.json.
_QWEN_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@contextlib.contextmanager
def opened(
  folder: pathlib.Path, given: str | os.PathLike | None = None
) -> Iterator[pathlib.Path | None]:
  """A `tokenizer.json` for the block: the one given, the folder's own, or one
  made from its `tokenizer.model`, or from its `vocab.json` and `merges.txt`.

  None where there is nothing to make it from, or "bytes" are asked for.

  Raises:
    WeightsError: a file that cannot be used.
  """
  if given == byte_tokenizer.NAME and not pathlib.Path(given).is_file():
    yield None
  elif given is not None:
    file = pathlib.Path(given)
    if not file.is_file():
      raise WeightsError(f"text tokenizer {file} is not a file.")
    yield file
  elif (folder / "tokenizer.json").is_file():
    yield folder / "tokenizer.json"
  else:
    made = convert(folder)
    if made is None:
      yield None
      return
    with tempfile.TemporaryDirectory() as scratch:
      file = pathlib.Path(scratch) / "tokenizer.json"
      made.save(str(file))
      yield file


def convert(folder: pathlib.Path) -> tokenizers.Tokenizer | None:
  """The folder's slow tokenizer, or None where it has none.

  Raises:
    WeightsError: a file that cannot be used.
  """
  added = added_tokens(folder)
  if (folder / "tokenizer.model").is_file():
    model = sentencepiece_model.read(folder / "tokenizer.model")
    made = _from_sentencepiece(model, added)
    _add_bos(made, folder, default=True)
  elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    made = _from_byte_level_bpe(folder, added)
    _add_bos(made, folder, default=False)
  else:
    return None
  made.add_tokens([token for token in added.values() if not token.special])
  made.add_special_tokens([t for t in added.values() if t.special])
  for i, token in added.items():
    if made.token_to_id(token.content) != i:
      raise WeightsError(
        f"{folder} gives token {token.content!r} the id {i}, but its "
        f"vocabulary has it at {made.token_to_id(token.content)}."
      )
  return made


def size(file: pathlib.Path | None) -> int | None:
  """How many ids a `tokenizer.json` gives out, gaps included; None for None.

  Raises:
    WeightsError: not such a file.
  """
  if file is None:
    return None
  return max(_load(file).get_vocab(with_added_tokens=True).values()) + 1


def add_tokens(folder: pathlib.Path, wanted: Mapping[str, int]) -> None:
  """Adds special tokens to `tokenizer.json`, and to the files of the slow
  tokenizer that stand beside it.

  Args:
    folder: is changed in place.
    wanted: text -> id; the ids that follow those in use.

  Raises:
    WeightsError: the tokens would get other ids.
  """
  file = folder / "tokenizer.json"
  model = _load(file)
  model.add_special_tokens(list(wanted))
  got = {text: model.token_to_id(text) for text in wanted}
  if got != wanted:
    raise WeightsError(
      f"tokenizer.json gives the new tokens ids {list(got.values())}, the rows "
      f"added to the model are {list(wanted.values())}; its vocabulary is not "
      "that of config.json."
    )
  model.save(str(file))
  added = folder / "added_tokens.json"
  if added.is_file():
    _write_json(added, read_json(added) | dict(wanted))
  config = folder / "tokenizer_config.json"
  values = read_json(config)
  if isinstance(values.get("added_tokens_decoder"), dict):
    flags = dict.fromkeys(
      ("lstrip", "normalized", "rstrip", "single_word"), False
    )
    for text, i in wanted.items():
      entry = {"content": text} | flags | {"special": True}
      values["added_tokens_decoder"][str(i)] = entry
    _write_json(config, values)


def _load(file: pathlib.Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # The library raises bare Exceptions.
    raise WeightsError(f"{file.name} cannot be read: {error}.") from error


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def added_tokens(folder: pathlib.Path) -> dict[int, AddedToken]:
  """Tokens that are recognized in text before anything else, by id, in rising
  order: of `added_tokens.json` and, above it, `tokenizer_config.json`.

  Raises:
    WeightsError: a file of another form.
  """
  found: dict[int, AddedToken] = {}
  name = "added_tokens.json"
  try:
    for text, i in read_json(folder / name).items():
      found[_id(i)] = AddedToken(_text(text), normalized=False, special=True)
    name = "tokenizer_config.json"
    entries = read_json(folder / name).get("added_tokens_decoder", {})
    for i, entry in entries.items():
      found[_id(int(i))] = AddedToken(
        _text(entry["content"]),
        single_word=entry.get("single_word", False),
        lstrip=entry.get("lstrip", False),
        rstrip=entry.get("rstrip", False),
        normalized=False,
        special=entry.get("special", True),
      )
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise WeightsError(
      f"{folder / name} does not list added tokens as a text tokenizer's file "
      f"does ({error!r})."
    ) from error
  return dict(sorted(found.items()))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; an empty one where the file is absent.

  Raises:
    WeightsError: the file is something else.
  """
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise WeightsError(f"{path} is not JSON: {error}.") from error
  if not isinstance(values, dict):
    raise WeightsError(f"{path} is not a JSON object.")
  return values


def _id(value: Any) -> int:
  if type(value) is not int or not 0 <= value < 1 << 31:
    raise ValueError(f"{value!r} is not an id")
  return value


def _text(value: Any) -> str:
  if not isinstance(value, str) or not value:
    raise ValueError(f"{value!r} is not the text of a token")
  return value


def _from_sentencepiece(
  model: SentencePieceModel, added: Mapping[int, AddedToken]
) -> tokenizers.Tokenizer:
  vocabulary: dict[str, int] = {}
  stand_ins: dict[str, str] = {}  # User-defined piece -> its one character.
  unknown = None
  for i, piece in enumerate(model.pieces):
    text = piece.text
    if i in added:  # A spare piece that the folder gave another text.
      text = added[i].content
    elif piece.type == PieceType.USER_DEFINED:
      text = chr(_FIRST_STAND_IN + len(stand_ins))
      stand_ins[piece.text] = text
    if piece.type == PieceType.UNKNOWN:
      unknown = text
    vocabulary[text] = i
  vocabulary |= {t.content: i for i, t in added.items()}
  made = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocabulary,
      merges=_merges(model, added),
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=model.byte_fallback,
    )
  )
  steps: list[Any] = []
  if model.charsmap:
    steps.append(normalizers.Precompiled(model.charsmap))
  if model.remove_extra_whitespaces:
    steps.append(normalizers.Replace(tokenizers.Regex(" +"), " "))
    steps.append(normalizers.Replace(tokenizers.Regex(r"\A | \z"), ""))
  if model.add_dummy_prefix:
    steps.append(normalizers.Prepend(_SPACE))
  steps.append(normalizers.Replace(" ", _SPACE))
  back: list[Any] = [decoders.Replace(_SPACE, " ")]
  for text in sorted(stand_ins, key=len, reverse=True):
    steps.append(normalizers.Replace(text, stand_ins[text]))
    back.append(decoders.Replace(stand_ins[text], text.replace(_SPACE, " ")))
  made.normalizer = normalizers.Sequence(steps)
  back += [decoders.ByteFallback(), decoders.Fuse()]
  if model.add_dummy_prefix:
    back.append(decoders.Strip(" ", left=1))
  made.decoder = decoders.Sequence(back)
  return made


def _merges(
  model: SentencePieceModel, added: Mapping[int, AddedToken]
) -> list[tuple[str, str]]:
  """Pairs that join, best first.

  SentencePiece joins any neighbors whose text is a piece: the best score
  first, among equals the leftmost. So every split of a piece is a merge, and
  of one piece's splits that with the longest left part comes first: among
  repeated characters the remainder stands on the right.
  """
  scores = {
    piece.text: piece.score
    for i, piece in enumerate(model.pieces)
    if piece.type == PieceType.NORMAL and i not in added
  }
  merges = []
  for text in sorted(scores, key=lambda t: -scores[t]):
    for cut in range(len(text) - 1, 0, -1):
      left, right = text[:cut], text[cut:]
      if left in scores and right in scores:
        merges.append((left, right))
  return merges


def _from_byte_level_bpe(
  folder: pathlib.Path, added: Mapping[int, AddedToken]
) -> tokenizers.Tokenizer:
  """Qwen2's and Qwen3's."""
  vocabulary = read_json(folder / "vocab.json")
  vocabulary |= {t.content: i for i, t in added.items()}
  try:
    lines = (folder / "merges.txt").read_text().split("\n")
    merges = [tuple(x.split(" ")) for x in lines if x and not _is_header(x)]
    model = models.BPE(vocab=vocabulary, merges=merges)  # type: ignore
  except Exception as error:  # The library raises bare Exceptions.
    raise WeightsError(
      f"{folder / 'vocab.json'} and merges.txt are not a text tokenizer's: "
      f"{error}."
    ) from error
  made = tokenizers.Tokenizer(model)
  made.normalizer = normalizers.NFC()
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  return made


def _is_header(line: str) -> bool:
  return line.startswith("#version")


def _add_bos(
  made: tokenizers.Tokenizer, folder: pathlib.Path, *, default: bool
) -> None:
  """Lets every text begin with the folder's `bos_token`, where it says so."""
  values = read_json(folder / "special_tokens_map.json")
  values |= read_json(folder / "tokenizer_config.json")
  bos = values.get("bos_token", "<s>" if default else None)
  if isinstance(bos, dict):
    bos = bos.get("content")
  add = values.get("add_bos_token", default)
  if not add or not isinstance(bos, str):
    return
  i = made.token_to_id(bos)
  if i is None:
    raise WeightsError(f"{folder} has no id for its bos_token {bos!r}.")
  made.post_processor = processors.TemplateProcessing(
    single=f"{bos} $A", special_tokens=[(bos, i)]
  )
