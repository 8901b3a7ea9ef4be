"""SentencePiece's `tokenizer.model`, read without the `sentencepiece` package.

The file is one protobuf message (`sentencepiece_model.proto`); the few fields
that decide ids are read here, so that import needs no compiled dependency.
"""

import dataclasses
import enum
import pathlib
import struct
from collections.abc import Iterator

from argenseg_jax.torch_weights.tensors import WeightsError

_BPE = 2  # TrainerSpec.ModelType


class PieceType(enum.IntEnum):
  NORMAL = 1
  UNKNOWN = 2
  CONTROL = 3
  USER_DEFINED = 4
  UNUSED = 5
  BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
  """One entry of the vocabulary; its id is its place in the list."""

  text: str
  score: float
  type: PieceType


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
  """A BPE model.

  Attributes:
    pieces: the vocabulary, in the order of ids.
    byte_fallback: unknown characters become byte pieces.
    charsmap: compiled character normalization; empty is none.
    add_dummy_prefix: a space is put before every text.
    remove_extra_whitespaces: of several spaces one stays, none at the ends.
  """

  pieces: tuple[Piece, ...]
  byte_fallback: bool
  charsmap: bytes
  add_dummy_prefix: bool
  remove_extra_whitespaces: bool


def read(path: pathlib.Path) -> SentencePieceModel:
  """Reads a `tokenizer.model`.

  Raises:
    WeightsError: not a SentencePiece model, or one of another kind than BPE.
  """
  try:
    data = path.read_bytes()
  except OSError as error:
    raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
  pieces: list[Piece] = []
  trainer: dict[int, int | bytes] = {}
  normalizer: dict[int, int | bytes] = {}
  try:
    for field, value in _fields(data):
      if field == 1:
        pieces.append(_piece(_bytes(value)))
      elif field == 2:
        trainer |= dict(_fields(_bytes(value)))
      elif field == 3:
        normalizer |= dict(_fields(_bytes(value)))
    if not pieces:
      raise ValueError("it has no pieces")
  except (ValueError, struct.error) as error:
    raise WeightsError(
      f"{path} is not a SentencePiece model: {error}."
    ) from error
  if trainer.get(3, 1) != _BPE:
    raise WeightsError(
      f"{path} is not a BPE model; only BPE models of SentencePiece are "
      "supported."
    )
  if trainer.get(24, 0) or not normalizer.get(5, 1):
    raise WeightsError(
      f"{path} does not put spaces before words as U+2581; this is not "
      "supported."
    )
  return SentencePieceModel(
    pieces=tuple(pieces),
    byte_fallback=bool(trainer.get(35, 0)),
    charsmap=_bytes(normalizer.get(2, b"")),
    add_dummy_prefix=bool(normalizer.get(3, 1)),
    remove_extra_whitespaces=bool(normalizer.get(4, 1)),
  )


def _piece(data: bytes) -> Piece:
  fields = dict(_fields(data))
  score = fields.get(2, b"\0\0\0\0")
  return Piece(
    text=_bytes(fields.get(1, b"")).decode(),
    score=struct.unpack("<f", _bytes(score))[0],
    type=PieceType(fields.get(3, PieceType.NORMAL)),
  )


def _bytes(value: int | bytes) -> bytes:
  if not isinstance(value, bytes):
    raise ValueError("a field has another type than expected")
  return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """(field number, value) of a protobuf message: varints as numbers, the rest
  as bytes."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _varint(data, at)
    else:
      if kind == 2:
        size, at = _varint(data, at)
      elif kind in (1, 5):
        size = 8 if kind == 1 else 4
      else:
        raise ValueError(f"a field has wire type {kind}")
      if at + size > len(data):
        raise ValueError("it ends inside a field")
      value, at = data[at : at + size], at + size
    yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    if at >= len(data):
      raise ValueError("it ends inside a number")
    byte = data[at]
    at += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, at
  raise ValueError("a number is longer than 64 bits")
