"""Named tensors on disk: safetensors folders, PyTorch pickles, and writing.

A *source* is anything with `tensors` (name -> `TensorInfo`) and `read(name)`;
reading touches one tensor at a time. Headers come from strangers: nothing in
them is believed before it has been checked against the file.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from argenseg_jax.checkpoint import CheckpointError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_MAX_RANK = 32
_INDEX = "model.safetensors.index.json"

_CONVERT = (
  'python -c "from transformers import AutoModel as A; '
  "A.from_pretrained('{0}', trust_remote_code=True, torch_dtype='auto')"
  ".save_pretrained('{0}-safetensors')\", then copy config.json and the text "
  "tokenizer's files beside them."
)


class WeightsError(CheckpointError):
  """PyTorch weights that cannot be used; the message names file and tensor."""


class TensorInfo(NamedTuple):
  shape: tuple[int, ...]
  dtype: np.dtype


class Source(Protocol):
  """Named tensors that are read one at a time."""

  @property
  def tensors(self) -> Mapping[str, TensorInfo]: ...

  def read(self, name: str) -> np.ndarray: ...


class SafetensorsFile:
  """One `*.safetensors` file.

  Raises:
    WeightsError: the header contradicts itself or the file.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    try:
      with open(self.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
          raise self._error("its header is longer than the file")
        header = json.loads(
          file.read(length).decode("utf-8"), object_pairs_hook=self._unique
        )
    except OSError as error:
      raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
      if isinstance(error, WeightsError):
        raise
      raise self._error("its header is no JSON object") from error
    if not isinstance(header, dict):
      raise self._error("its header is no JSON object")
    header.pop("__metadata__", None)
    self._start = 8 + length
    self.tensors: dict[str, TensorInfo] = {}
    self._offset: dict[str, int] = {}
    spans = [self._add(name, entry) for name, entry in header.items()]
    end = 0
    for begin, stop, name in sorted(spans):
      if begin != end:
        raise self._error(f"tensor {name!r} overlaps or leaves a hole")
      end = stop
    if end != size - self._start:
      raise self._error(
        f"its tensors need {end} bytes and {size - self._start} follow the "
        "header; fetch the file again"
      )

  def read(self, name: str) -> np.ndarray:
    shape, dtype = self.tensors[name]
    with open(self.path, "rb") as file:
      file.seek(self._start + self._offset[name])
      flat = np.empty(math.prod(shape), dtype)
      if file.readinto(flat.view(np.uint8).data) != flat.nbytes:
        raise self._error(f"it ends inside tensor {name!r}")
    return flat.reshape(shape)

  def _add(self, name: str, entry) -> tuple[int, int, str]:
    """Checks one header entry; returns where its bytes lie."""
    try:
      if entry["dtype"] not in DTYPES:
        raise WeightsError(
          f"{self.path} holds tensor {name!r} as {entry['dtype']}"
          f"{_reason(entry['dtype'])}."
        )
      dtype = DTYPES[entry["dtype"]]
      shape, (begin, stop) = entry["shape"], entry["data_offsets"]
      numbers = [*shape, begin, stop]
    except WeightsError:
      raise
    except (TypeError, KeyError, ValueError) as error:
      raise self._error(f"the entry of tensor {name!r} is malformed") from error
    if len(numbers) > _MAX_RANK or not all(
      type(n) is int and 0 <= n < 1 << 60 for n in numbers
    ):
      raise self._error(f"the entry of tensor {name!r} is malformed")
    if stop - begin != math.prod(shape) * dtype.itemsize:
      raise self._error(
        f"tensor {name!r} {shape} of {dtype} does not fill its offsets"
      )
    self.tensors[name] = TensorInfo(tuple(shape), dtype)
    self._offset[name] = begin
    return begin, stop, name

  def _unique(self, pairs):
    entries = dict(pairs)
    if len(entries) != len(pairs):
      raise self._error("its header names a tensor twice")
    return entries

  def _error(self, what: str) -> WeightsError:
    return WeightsError(f"{self.path} is damaged: {what}.")


class SafetensorsFolder:
  """All tensors of a Hugging Face style folder.

  With an index, exactly the files and tensors that it names; without one, the
  single `*.safetensors` file there.

  Raises:
    WeightsError: a file or tensor is absent, or stands in two files.
  """

  def __init__(self, folder: str | os.PathLike):
    self.path = pathlib.Path(folder)
    if not self.path.is_dir():
      raise WeightsError(f"{folder} is not a folder.")
    index = self.path / _INDEX
    weight_map = _read_index(index) if index.is_file() else None
    if weight_map is None:
      names = sorted(p.name for p in self.path.glob("*.safetensors"))
      pickles = sorted(p.name for p in self.path.glob("pytorch_model*.bin"))
      if pickles and not names:
        raise WeightsError(
          f"{folder} holds PyTorch pickles ({pickles[0]}) and no *.safetensors "
          "files; convert them first, in an environment with torch and "
          f"transformers: {_CONVERT.format(folder)}"
        )
      if len(names) != 1:
        raise WeightsError(
          f"{folder} holds {len(names)} *.safetensors files and no {_INDEX}; "
          "give the folder of a whole checkpoint."
        )
    else:
      names = sorted(set(weight_map.values()))
    self.tensors: dict[str, TensorInfo] = {}
    self._file: dict[str, SafetensorsFile] = {}
    for name in names:
      if not (self.path / name).is_file():
        raise WeightsError(f"{index} names {name}, which is absent: fetch it.")
      file = SafetensorsFile(self.path / name)
      for tensor, info in file.tensors.items():
        if weight_map is not None and weight_map.get(tensor) != name:
          raise WeightsError(
            f"{file.path} holds tensor {tensor!r}, which {_INDEX} does not "
            "place there."
          )
        self.tensors[tensor] = info
        self._file[tensor] = file
    for tensor, name in (weight_map or {}).items():
      if tensor not in self.tensors:
        raise WeightsError(f"{index} places {tensor!r} in {name}: not there.")

  def read(self, name: str) -> np.ndarray:
    return self._file[name].read(name)


class PickleFile:
  """A PyTorch pickle (`*.pth`), loaded with weights-only safety.

  Raises:
    WeightsError: torch is not installed, or the file holds more than tensors.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    try:
      import torch
    except ImportError as error:
      raise WeightsError(
        f"{path} is a PyTorch pickle, which only torch reads: install "
        "argenseg_jax[torch], or give a *.safetensors file."
      ) from error
    try:
      state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
      raise WeightsError(f"{path} cannot be read: {error}.") from error
    except Exception as error:
      raise WeightsError(
        f"{path} is refused: it is no pickle of plain tensors."
      ) from error
    if not isinstance(state, Mapping) or not all(
      isinstance(key, str) and isinstance(value, torch.Tensor)
      for key, value in state.items()
    ):
      raise WeightsError(f"{path} is refused: it is no table of named tensors.")
    self._state = state
    self._bfloat16 = torch.bfloat16
    self._bits = torch.int16
    self.tensors: dict[str, TensorInfo] = {}
    dtypes = {dtype.name: dtype for dtype in DTYPES.values()}
    room = self.path.stat().st_size
    for name, value in state.items():
      kind = str(value.dtype).removeprefix("torch.")
      # A view may be endless: all its values may share one place.
      odd = value.layout != torch.strided or value.is_quantized
      if kind not in dtypes or odd:
        raise WeightsError(
          f"{path} is refused: tensor {name!r} is a {kind}{_reason(kind)}."
        )
      if value.numel() * value.element_size() > room:
        raise WeightsError(
          f"{path} is refused: tensor {name!r} {list(value.shape)} is larger "
          "than the file."
        )
      self.tensors[name] = TensorInfo(tuple(value.shape), dtypes[kind])

  def read(self, name: str) -> np.ndarray:
    value = self._state[name].detach().contiguous()
    if value.dtype == self._bfloat16:
      return value.view(self._bits).numpy().view(DTYPES["BF16"])
    return value.numpy()


class Computed:
  """Tensors that are computed from others when they are read."""

  def __init__(
    self, entries: Mapping[str, tuple[TensorInfo, Callable[[], np.ndarray]]]
  ):
    self.tensors = {name: info for name, (info, _) in entries.items()}
    self._make = {name: make for name, (_, make) in entries.items()}

  def read(self, name: str) -> np.ndarray:
    return self._make[name]()


class Merged:
  """Several sources under one roof; a name in two of them comes from the
  later one."""

  def __init__(self, *sources: Source):
    self._source = {name: s for s in sources for name in s.tensors}
    self.tensors = {name: s.tensors[name] for name, s in self._source.items()}

  def read(self, name: str) -> np.ndarray:
    return self._source[name].read(name)


class Renamed:
  """A source whose names get a prefix."""

  def __init__(self, source: Source, prefix: str):
    self._source, self._prefix = source, prefix
    self.tensors = {prefix + n: info for n, info in source.tensors.items()}

  def read(self, name: str) -> np.ndarray:
    return self._source.read(name.removeprefix(self._prefix))


def open_file(path: str | os.PathLike) -> Source:
  """A safetensors file, a folder of them, or a PyTorch pickle."""
  path = pathlib.Path(path)
  if path.is_dir():
    return SafetensorsFolder(path)
  if not path.exists():
    raise WeightsError(f"{path} does not exist.")
  if path.suffix in (".pth", ".pt", ".bin"):
    return PickleFile(path)
  return SafetensorsFile(path)


def write_folder(
  folder: str | os.PathLike,
  source: Source,
  *,
  max_file_bytes: int = 5_000_000_000,
) -> None:
  """Writes all tensors of `source`, one at a time, as Hugging Face does.

  One `model.safetensors`, or numbered files of at most `max_file_bytes` (a
  larger tensor stands alone) with an index.
  """
  folder = pathlib.Path(folder)
  groups, used = [[]], 0
  for name, info in source.tensors.items():
    size = _bytes(info)
    if groups[-1] and used + size > max_file_bytes:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  if len(groups) == 1:
    write_file(folder / "model.safetensors", source, groups[0])
    return
  weight_map = {}
  for i, names in enumerate(groups, 1):
    file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
    write_file(folder / file, source, names)
    weight_map |= dict.fromkeys(names, file)
  total = sum(map(_bytes, source.tensors.values()))
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(
  path: str | os.PathLike, source: Source, names: Iterable[str]
) -> None:
  """Writes the named tensors of `source` as one safetensors file."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  names = list(names)
  for name in names:
    info = source.tensors[name]
    header[name] = {
      "dtype": _CODES[np.dtype(info.dtype)],
      "shape": list(info.shape),
      "data_offsets": [end, end + _bytes(info)],
    }
    end += _bytes(info)
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
      array = np.ascontiguousarray(source.read(name))
      file.write(array.reshape(-1).view(np.uint8).data)


def _reason(kind: str) -> str:
  """Why a dtype is not read, and what to do."""
  if "8" in kind and kind.lower().startswith(("f8", "float8")):
    return (
      ", weights rounded to 8 bits whose scales stand elsewhere; give the "
      "bfloat16 release of this model (eval and predict round it themselves "
      "with --weights float8_e4m3fn)"
    )
  return f", which is not supported; use one of {', '.join(DTYPES)}"


def is_floating(dtype: np.dtype) -> bool:
  return dtype.kind == "f" or dtype == DTYPES["BF16"]


def _bytes(info: TensorInfo) -> int:
  return math.prod(info.shape) * np.dtype(info.dtype).itemsize


def _read_index(path: pathlib.Path) -> dict[str, str]:
  try:
    weight_map = json.loads(path.read_text())["weight_map"]
    pairs = list(weight_map.items())
  except (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    RecursionError,
  ) as error:
    raise WeightsError(f"{path} is no index of safetensors files.") from error
  for tensor, name in pairs:
    if not isinstance(name, str) or pathlib.Path(name).name != name:
      raise WeightsError(f"{path} places {tensor!r} outside its folder.")
  return weight_map
