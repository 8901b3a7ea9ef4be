"""Files made to do harm are refused with a sentence, in bounded memory."""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from data import layouts

from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data import (
  chat,
  image_codec,
  mask_image,
  masks,
  text,
)
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.refer import parse_refs
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.torch_weights import tensors
from argenseg_jax.torch_weights.parity import compare
from argenseg_jax.torch_weights.tensors import WeightsError
from argenseg_jax.training import code_cache


@pytest.fixture(autouse=True)
def _bounded_memory():
  """No test takes more than 64 MB at a time, whatever its file says."""
  tracemalloc.start()
  yield
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 64e6


class _Calls:
  def __init__(self, function, *arguments):
    self._call = function, arguments

  def __reduce__(self):
    return self._call


def _shared_lists():
  """Forty lists, each twice in the next: endless when printed."""
  value = []
  for _ in range(40):
    value = [value, value]
  return value


@pytest.mark.parametrize(
  ("raw", "said"),
  [
    (pickle.dumps([_Calls(eval, "1/0")]), "asks for builtins.eval"),
    (pickle.dumps([_Calls(bytearray, 9)]), "asks for builtins.bytearray"),
    (b"]r\xff\xff\xff\x7f.", "numbers an object"),  # A memo of 16 GB.
    (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "not a pickle"),
    (b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.", "not a pickle"),
    (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
    (pickle.dumps([{"split": "a"}]), "not a list of references"),
    (b"(" * 10_000, "not a pickle"),
  ],
)
def test_a_pickle_holds_plain_values_only(raw, said, tmp_path):
  path = tmp_path / "refs(unc).p"
  path.write_bytes(raw)
  with pytest.raises(DataError, match=said):
    parse_refs(path.read_bytes(), path)


@pytest.mark.parametrize("field", ["split", "image_id", "sentences", "ann_id"])
def test_values_shared_a_thousandfold_are_not_printed(field, tmp_path):
  path = tmp_path / "refs(unc).p"
  ref = {"ref_id": 0, "ann_id": 0, "image_id": 0, "split": "train"}
  ref |= {"sentences": [{"sent": "x"}], "ref_id": _shared_lists()}
  ref[field] = _shared_lists()
  path.write_bytes(pickle.dumps([ref]))
  layouts.write("refer", tmp_path / "other")
  instances = (tmp_path / "other" / "instances.json").read_bytes()
  (tmp_path / "instances.json").write_bytes(instances)
  with pytest.raises(DataError) as caught:
    open_source(DataConfig(str(path), source="refer"))[0]
  assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_sentence_must_be_text(tmp_path):
  layouts.write("refer", tmp_path)
  path = tmp_path / "refs(unc).p"
  refs = pickle.loads(path.read_bytes())
  refs[0]["sentences"] = [{"sent": _shared_lists()}]
  path.write_bytes(pickle.dumps(refs))
  source = open_source(DataConfig(str(path), source="refer"))
  with pytest.raises(DataError, match="ref_id 0 has a sentence that is no"):
    source[0]


@pytest.mark.parametrize(
  "name", ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "a\0b", "", 7, None]
)
def test_no_record_reads_outside_its_folder(name, tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  layouts.image(tmp_path / "a.jpg", 0)
  record = {"image": name, "mask": [], "conversations": layouts.chat("a", "b")}
  chat = layouts.write_lines(folder / "x.jsonl", [record])
  record = {"mask": [name], "conversations": layouts.chat("a", "<mask>")}
  mask = layouts.write_lines(folder / "z.jsonl", [record])
  pair = layouts.write_lines(folder / "y.jsonl", [{"image": name, "text": "a"}])
  panoptic = folder / "panoptic"
  layouts.write("coco_panoptic", panoptic)
  coco = json.loads((panoptic / "panoptic.json").read_text())
  coco["images"][0]["file_name"] = name
  coco["annotations"][1]["file_name"] = name
  (panoptic / "panoptic.json").write_text(json.dumps(coco))
  refs = folder / "refs"
  layouts.write("refer", refs)
  coco = json.loads((refs / "instances.json").read_text())
  for picture in coco["images"]:
    picture["file_name"] = name
  (refs / "instances.json").write_text(json.dumps(coco))
  for path, source, indices in (
    (chat, "jsonl", (0,)),
    (mask, "jsonl", (0,) if isinstance(name, str) else ()),
    (refs / "refs(unc).p", "refer", (0,)),
    (pair, "text_to_image", (0,)),
    (panoptic / "panoptic.json", "coco_panoptic", (0, 1)),
  ):
    if path == chat and not name and name != 0:
      continue  # Text alone.
    for index in indices:
      with pytest.raises(DataError, match=r"names|cannot read"):
        _read(open_source(DataConfig(str(path), source=source)), index)


def _read(source, index):
  """Opens every file of a record."""
  sample = source[index]
  sample = sample.choose(0) if sample.options else sample
  for number in range(len(sample.images)):
    sample.load_image(number)
  sample.load_seg_mask()


def _png(width: int, height: int) -> bytes:
  """A whole PNG of one color, 8 bits a pixel: small however large it is."""

  def chunk(kind, data):
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check

  packer = zlib.compressobj(9)
  row = bytes(1 + min(width, 60_000))
  data = b"".join(packer.compress(row) for _ in range(min(height, 100)))
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    + chunk(b"IDAT", data + packer.flush())
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(
  "raw",
  [
    _png(60_000, 60_000),
    _png(2**31 - 1, 2**31 - 1),
    b"P5 100000 100000 255\n" + b"a" * 99,
    b"BM"
    + struct.pack("<IHHIIiiHH", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24)
    + bytes(24),
  ],
)
def test_a_picture_larger_than_any_is_not_decoded(raw):
  for decode in (image_codec.decode_image, mask_image.read):
    with pytest.raises(DataError, match=r"cannot decode .* \(bytes\)"):
      decode(raw)


def test_a_picture_that_is_a_program_is_not_run():
  with pytest.raises(DataError, match="not a known image format"):
    image_codec.decode_image(
      b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )


@pytest.mark.parametrize(
  ("stored", "size"),
  [
    ({"size": [10**6, 10**6], "counts": [10**12]}, None),
    ({"size": [-4, -6], "counts": [24]}, None),
    ({"size": [10**5000, 1], "counts": [1]}, None),
    ({"size": [4, 6], "counts": "P" * 100_000}, None),
    ({"size": [4, 6], "counts": 7}, None),
    ([[0.0, 0.0, 2**31, 5.0, 7.0, 1e9]], (20, 30)),
    ([[0.0, 0.0, float("nan"), 5.0, 7.0, 9.0]], (20, 30)),
    ([[0.0, 0.0, 10**400, 5.0, 7.0, 9.0]], (20, 30)),
    ([[0.0, 0.0, 30.0, 20.0] * 20_000], (20, 30)),
    ([[0, 0, 9, 9, 9, 0], {}], (20, 30)),
    ([[0.0, 0.0, 9.0, 9.0, 9.0, 0.0]], (10**6, 10**6)),
    (masks.Shapes((((0.0, 0.0), (1e300, 1.0)),), (True,)), (20, 30)),
    (masks.Shapes((((0.0, 0.0), (1.0, 1.0)),), (True,)), (10**6, 10**6)),
  ],
)
def test_a_mask_out_of_range_is_refused(stored, size):
  with pytest.raises(DataError):
    masks.load_seg_mask(stored, size=size)


@pytest.mark.parametrize("words", ["a" * 1_000_000, "a b " * 250_000])
def test_a_prompt_of_a_million_characters_is_refused(words):
  tokenizer = text.TextTokenizer()
  for turns in (
    layouts.chat(words, "b"),
    layouts.chat("a", words),
    [{"from": "system", "value": words}, *layouts.chat("a", "b")],
  ):
    with pytest.raises(DataError, match=r"1000\d\d\d characters is too long"):
      chat.tokenize_chat(tokenizer, turns)
  with pytest.raises(DataError, match="too long"):
    chat.chat_prompt(tokenizer, layouts.chat(words, "b")[:1])


def test_half_a_character_is_refused():
  turns = layouts.chat("left \ud800 box", "b")  # As JSON may write it.
  with pytest.raises(DataError, match="half a character"):
    chat.tokenize_chat(text.TextTokenizer(), turns)


@pytest.mark.parametrize(
  "line", ["[" * 100_000, "9" * 5_000, '{"image": ' + "9" * 5_000 + "}", "{}"]
)
def test_json_that_no_parser_likes_is_refused(line, tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text(line + "\n")
  with pytest.raises(DataError, match=r"x.jsonl line 1"):
    open_source(DataConfig(str(path), source="jsonl"))[0]


@pytest.mark.parametrize(
  ("shape", "offsets"),
  [
    ([1 << 62], [0, 1 << 64]),
    ([1 << 40, 0], [0, 8]),
    ([10**4000, 0], [0, 0]),
    ([1] * 1_000, [0, 4]),
    ([2], [4, 12]),
  ],
)
def test_a_safetensors_header_is_not_believed(shape, offsets, tmp_path):
  path = tmp_path / "x.safetensors"
  header = json.dumps(
    {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
  ).encode()
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
  with pytest.raises(WeightsError, match=r"x.safetensors is damaged"):
    tensors.SafetensorsFile(path)


def test_codes_that_unpack_to_gigabytes_are_not_unpacked(tmp_path):
  path = tmp_path / "codes.npz"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    with archive.open("codes.npy", "w") as file:
      for _ in range(40):
        file.write(bytes(1 << 20))
    archive.writestr("../../note.npy", b"x")
  with pytest.raises(ConfigError, match=r"codes.npz is not .* unpacks to 4"):
    code_cache.stored(path, (3, 1, 5), 16)
  for codes in (np.full((3, 1, 5), 16, np.int32), np.zeros(3, object)):
    file = io.BytesIO()
    np.savez(file, codes=codes, note="{}")
    path.write_bytes(file.getvalue())
    with pytest.raises(ConfigError, match="is not a file of `argenseg data"):
      code_cache.stored(path, (3, 1, 5), 16)


def test_archives_unpack_nowhere_and_are_not_believed(tmp_path):
  folder = tmp_path / "a" / "b"
  folder.mkdir(parents=True)
  path = folder / "codes.npz"
  outside = str(tmp_path / "outside")
  stamps = np.zeros(3, np.uint64)
  arrays = {"codes": np.ones((3, 1, 5), np.int32), "note": "{}"}
  arrays |= {"quick": stamps, "content": stamps}
  np.savez(path, **arrays, **{"../../outside": 1, outside: 1})
  codes, note, _ = code_cache.stored(path, (3, 1, 5), 16)
  assert codes.sum() == 15
  assert note == {}
  assert [p.name for p in tmp_path.rglob("*")] == ["a", "b", "codes.npz"]
  header = io.BytesIO()
  entry = {"descr": "<i4", "fortran_order": False, "shape": (1 << 30,)}
  np.lib.format.write_array_header_1_0(header, entry)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("codes.npy", header.getvalue() + b"few")
  with pytest.raises(ConfigError, match="fewer bytes than"):
    code_cache.stored(path, (3, 1, 5), 16)


@pytest.mark.parametrize(
  "header",
  [
    "{'descr': '<i}', 'shape': (3, 1, 5L, }",
    "{'descr': '<,4', 'fortran_order': False, 'shape': (3, 1, 5), } # L",
  ],
)
def test_an_array_with_an_odd_header_is_refused(header, tmp_path):
  """Found by fuzzing: errors of Python's tokenizer ended the run."""
  raw = header.ljust(117).encode() + b"\n"
  with zipfile.ZipFile(tmp_path / "codes.npz", "w") as archive:
    archive.writestr("codes.npy", b"\x93NUMPY\x01\x00v\x00" + raw)
  with pytest.raises(ConfigError, match=r"codes.npz is not a file of"):
    code_cache.stored(tmp_path / "codes.npz", (3, 1, 5), 16)


def test_recordings_that_unpack_to_gigabytes_are_not_unpacked(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  path = tmp_path / "io.npz"
  with (
    zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as io_npz,
    io_npz.open("in.npy", "w") as file,
  ):
    for _ in range(65):
      file.write(bytes(1 << 20))
  with pytest.raises(WeightsError, match=r"io.npz cannot be read: it unpacks"):
    compare.Golden.open(tmp_path)


def test_a_polygon_without_its_picture_is_refused(tmp_path):
  """Found by fuzzing: it ended the run."""
  record = {"mask": [[layouts.box(layouts.LEFT)]]}
  record["conversations"] = layouts.chat("a", "<mask>")
  path = layouts.write_lines(tmp_path / "x.jsonl", [record])
  sample = open_source(DataConfig(str(path), source="jsonl"))[0]
  with pytest.raises(DataError, match="line 1 has no image"):
    sample.load_seg_mask()


@pytest.mark.parametrize("key", ["annotation", "root", "split"])
def test_a_meta_file_names_things_by_text(key, tmp_path):
  """Found by fuzzing."""
  layouts.write("meta", tmp_path)
  path = tmp_path / "meta.json"
  content = json.loads(path.read_text())
  content["chat"][key] = []
  path.write_text(json.dumps(content))
  with pytest.raises(DataError, match=rf"'chat' has {key} \[\], which is no"):
    open_source(DataConfig(str(path), source="meta"))


def test_a_line_of_class_names_without_number_is_named(tmp_path):
  """Found by fuzzing."""
  keys = layouts.write("ade20k", tmp_path)
  with (tmp_path / "objectInfo150.txt").open("a") as file:
    file.write("sky, heaven\n")
  with pytest.raises(DataError, match="has the line 'sky, heaven'"):
    open_source(DataConfig(**keys))
