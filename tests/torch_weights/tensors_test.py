"""Reading and writing tensors on disk; headers from strangers."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from argenseg_jax.torch_weights import tensors
from argenseg_jax.torch_weights.tensors import WeightsError


def _source(**arrays):
  return tensors.Computed(
    {
      n: (tensors.TensorInfo(a.shape, a.dtype), lambda a=a: a)
      for n, a in arrays.items()
    }
  )


ARRAYS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b.weight": np.array([1.5, -2.0], ml_dtypes.bfloat16),
  "c": np.array(7, np.int64),
}


def _raw(path, header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  size = len(text) if length is None else length
  path.write_bytes(size.to_bytes(8, "little") + text + data)
  return path


def test_what_we_write_others_read_and_back(tmp_path):
  path = tmp_path / "x.safetensors"
  tensors.write_file(path, _source(**ARRAYS), ARRAYS)
  theirs = safetensors.numpy.load_file(path)
  ours = tensors.SafetensorsFile(path)
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(theirs[name], array)
    np.testing.assert_array_equal(ours.read(name), array)
    assert ours.tensors[name] == (array.shape, array.dtype)


def test_what_others_write_we_read(tmp_path):
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(ARRAYS, path, {"format": "pt"})
  ours = tensors.SafetensorsFile(path)
  assert set(ours.tensors) == set(ARRAYS)
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(ours.read(name), array)


def test_folder_in_several_files(tmp_path):
  tensors.write_folder(tmp_path, _source(**ARRAYS), max_file_bytes=25)
  assert len(list(tmp_path.glob("model-*-of-00002.safetensors"))) == 2
  folder = tensors.SafetensorsFolder(tmp_path)
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(folder.read(name), array)


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
  "longer than the file": (b"{}", b"", 1 << 62),
  "no JSON object": (b"[1]", b"", None),
  "JSON": (b'{"a":', b"", None),
  "twice": (b'{"a": 1, "a": 2}', b"", None),
  "fill": ({"a": _F32 | {"data_offsets": [0, 4]}}, b"1234", None),
  "bytes": ({"a": _F32}, b"1234", None),
  "follow": ({"a": _F32}, b"1234567890", None),
  "overlaps": ({"a": _F32, "b": _F32}, b"12345678", None),
  "hole": ({"a": _F32 | {"data_offsets": [8, 16]}}, b"0" * 16, None),
  "malformed": ({"a": _F32 | {"shape": [-2]}}, b"12345678", None),
  "Q9, which is not": ({"a": _F32 | {"dtype": "Q9"}}, b"12345678", None),
  "'a'": ({"a": _F32 | {"shape": [10**30]}}, b"12345678", None),
  "of tensor": ({"a": [1, 2]}, b"", None),
  "nested": (b"[" * 100_000, b"", None),
  "digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, case):
  header, data, length = HOSTILE[case]
  path = _raw(tmp_path / "x.safetensors", header, data, length)
  word = case if case not in ("nested", "digits") else "JSON"
  with pytest.raises(WeightsError, match=word) as error:
    tensors.SafetensorsFile(path)
  assert "x.safetensors" in str(error.value)
  assert "\n" not in str(error.value)


def test_truncated_file(tmp_path):
  path = tmp_path / "x.safetensors"
  tensors.write_file(path, _source(**ARRAYS), ARRAYS)
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(WeightsError, match="fetch the file again"):
    tensors.SafetensorsFile(path)


@pytest.mark.parametrize("size", [0, 3, 8])
def test_almost_empty_file(tmp_path, size):
  path = tmp_path / "x.safetensors"
  path.write_bytes(b"\0" * size)
  with pytest.raises(WeightsError, match="damaged"):
    tensors.SafetensorsFile(path)


def test_index_that_leaves_its_folder(tmp_path):
  index = {"weight_map": {"a": "../x.safetensors"}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(WeightsError, match="outside its folder"):
    tensors.SafetensorsFolder(tmp_path)


def test_pickle_without_torch_or_of_more_than_tensors(tmp_path):
  path = tmp_path / "x.pth"
  path.write_bytes(b"not a pickle")
  with pytest.raises(WeightsError, match=r"install|refused"):
    tensors.open_file(path)
