"""What a fuzzer does to every parser of files that users bring.

A parser may return, or refuse with the error of its kind; anything else is a
find. `fuzz_test.py` runs a few examples of each target in the suite. By hand,
for minutes and with new examples each time (finds are printed):

  python tests/faults/fuzzing.py --minutes=10 [TARGET ...]
"""

import argparse
import contextlib
import io
import json
import pathlib
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

if __name__ == "__main__":  # Pytest puts it on the path by itself.
  sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from data import layouts
from faults.spoiling import edited, mutated, spoiled

from argenseg_jax import checkpoint
from argenseg_jax.checkpoint import manifest as integrity
from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data import (
  chat,
  image_codec,
  mask_image,
  masks,
  text,
)
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.sources import array_record
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.evaluation import records
from argenseg_jax.torch_weights import hf_config, tensors
from argenseg_jax.training import code_cache

_TOKENIZER = text.TextTokenizer()


def _folder() -> pathlib.Path:
  return pathlib.Path(tempfile.mkdtemp(prefix="fuzz"))


def _layout(name: str) -> Callable[[Any], None]:
  """Spoils one file of a layout, then opens it and makes every row."""
  folder = _folder()
  config = DataConfig(
    **{
      "mask_channels": 1,
      **layouts.write(name, folder),
      "sequence_length": 160,
      "image_side": 16,
      "mask_side": 16,
      "mask_intermediate_side": None,
    }
  )
  files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
  originals = {path: path.read_bytes() for path in files}

  def target(data):
    path = data.draw(st.sampled_from(files))
    raw = originals[path]
    if path.suffix == ".json":
      new = data.draw(spoiled(raw))
    elif path.suffix == ".jsonl":
      lines = raw.splitlines()
      i = data.draw(st.integers(0, len(lines) - 1))
      lines[i] = data.draw(spoiled(lines[i]))
      new = b"\n".join(lines)
    elif path.suffix == ".p" and data.draw(st.booleans()):
      new = pickle.dumps(data.draw(edited(pickle.loads(raw))), 2)
    else:
      new = data.draw(mutated(raw))
    path.write_bytes(new)
    try:
      with contextlib.suppress(DataError):
        rows = RowMaker(
          open_source(config, evaluation=data.draw(st.booleans())),
          config,
          tokenizer=_TOKENIZER,
          image_tokens=4,
          num_codes=5,
        )
        for index in range(len(rows.source)):
          rows(index)
    finally:
      path.write_bytes(raw)

  return target


_LENGTHS = {"size": [4, 6], "counts": [3, 5, 16]}
_CODED = {
  "size": [20, 30],
  "counts": masks.run_lengths(layouts.LEFT)["counts"],
}


def _segmentations(data) -> None:
  box = layouts.box(layouts.LEFT)
  kind = data.draw(st.integers(0, 3))
  if kind == 0:
    stored = data.draw(edited(_LENGTHS) | edited(_CODED))
  elif kind == 1:
    stored = data.draw(edited([box, box]))
  elif kind == 2:
    counts = data.draw(st.text(st.characters(min_codepoint=40), max_size=30))
    stored = {
      "size": data.draw(st.lists(st.integers(-9, 99))),
      "counts": counts,
    }
  else:
    corner = st.tuples(st.floats(), st.floats())
    corners = tuple(data.draw(st.lists(corner, min_size=1, max_size=9)))
    stored = masks.Shapes((corners,), (True,))
  size = data.draw(st.sampled_from([None, (20, 30), (4, 6), (1, 1)]))
  with contextlib.suppress(DataError):
    masks.load_seg_mask(stored, size=size)


def _pictures() -> list[bytes]:
  pixels = np.random.default_rng(0).integers(0, 255, (9, 14, 3), np.uint8)
  picture, found = Image.fromarray(pixels), []
  for format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
    file = io.BytesIO()
    picture.save(file, format)
    found.append(file.getvalue())
  for mode in ("P", "1", "L"):
    file = io.BytesIO()
    picture.convert(mode).save(file, "PNG")
    found.append(file.getvalue())
  return found


_PICTURES = _pictures()


def _picture(data) -> None:
  raw = data.draw(mutated(data.draw(st.sampled_from(_PICTURES))))
  for decode in (image_codec.decode_image, mask_image.read):
    with contextlib.suppress(DataError):
      decode(raw)


def _conversation(data) -> None:
  piece = st.sampled_from(
    [*text.SPECIAL_TOKENS.values(), "<image>", "\n", "a", "\ud800", "é" * 9]
  )
  words = st.lists(piece, max_size=12).map("".join)
  turn = st.fixed_dictionaries(
    {"from": st.sampled_from(["system", "human", "gpt"]), "value": words}
  )
  turns = data.draw(st.lists(turn, max_size=4))
  images = (4,) * data.draw(st.integers(0, 2))
  with contextlib.suppress(DataError):
    tokens = chat.tokenize_chat(
      _TOKENIZER, turns, image_tokens=images, num_codes=5
    )
    special = _TOKENIZER.token_ids
    chat.text_row((tokens.cut(40, special),), 40, special)


def _safetensors() -> Callable[[Any], None]:
  path = _folder() / "x.safetensors"
  header = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
  }

  def target(data):
    new = data.draw(spoiled(json.dumps(header).encode()))
    length = data.draw(st.just(len(new)) | st.integers(0, 2**64 - 1))
    body = data.draw(st.just(b"\0" * 28) | st.binary(max_size=40))
    path.write_bytes(length.to_bytes(8, "little") + new + body)
    with contextlib.suppress(tensors.WeightsError):
      file = tensors.SafetensorsFile(path)
      for name in file.tensors:
        file.read(name)

  return target


def _weights_folder() -> Callable[[Any], None]:
  folder = _folder()
  raw = {
    "model.safetensors.index.json": {"weight_map": {"a": "x.safetensors"}},
    "config.json": {"vocab_size": 3, "hidden_size": 4, "llm_config": {"a": 1}},
    "tokenizer_config.json": {
      "added_tokens_decoder": {"7": {"content": "<mask>"}}
    },
  }

  def target(data):
    for name, content in raw.items():
      new = data.draw(spoiled(json.dumps(content).encode()))
      (folder / name).write_bytes(new)
    for read in (
      tensors.SafetensorsFolder,
      hf_config.read,
      lambda folder: hf_config._tokenizer_ids(folder, None),
    ):
      with contextlib.suppress(tensors.WeightsError):
        read(folder)

  return target


def _codes() -> Callable[[Any], None]:
  path = _folder() / "codes.npz"
  file = io.BytesIO()
  np.savez(file, codes=np.zeros((3, 1, 5), np.int32), note="{}")
  raw = file.getvalue()

  def target(data):
    path.write_bytes(data.draw(mutated(raw)))
    with contextlib.suppress(ConfigError):
      code_cache.stored(path, (3, 1, 5), 16)

  return target


def _predictions() -> Callable[[Any], None]:
  path = _folder() / "predictions.jsonl"
  coded = masks.run_lengths(layouts.LEFT)
  record = {"sample": 0, "picture": "a", "text": "b", "has_mask": True}
  record |= {"mask": coded, "truth": coded, "expressions": ["c"], "kind": "d"}

  def target(data):
    path.write_bytes(data.draw(spoiled(json.dumps(record).encode())) + b"\n")
    with contextlib.suppress(DataError):
      records.rescore(path)

  return target


def _text_tokenizer() -> Callable[[Any], None]:
  path = _folder() / "tokenizer.json"
  whole = json.loads(text.SHIPPED.read_text())
  kept = {k: v for k, v in whole.items() if k != "model"}

  def target(data):
    new = data.draw(edited(kept)) if data.draw(st.booleans()) else kept
    model = whole["model"]
    if data.draw(st.booleans()):
      model = data.draw(edited({k: model[k] for k in ("type", "unk_token")}))
      model = {**whole["model"], **model} if isinstance(model, dict) else model
    if isinstance(new, dict):
      new = new | {"model": model}
    path.write_text(json.dumps(new))
    with contextlib.suppress(DataError):
      text.TextTokenizer(path)

  return target


def _checkpoint() -> Callable[[Any], None]:
  step = _folder() / "checkpoints" / "1"
  (step / "meta").mkdir(parents=True)
  meta = step / "meta" / "metadata"
  raw = json.dumps(
    {"task": "vqvae", "format": 1, "model": {"name": "a", "vision": {}}}
  ).encode()

  def target(data):
    meta.write_bytes(data.draw(spoiled(raw)))
    integrity.sign(step)
    manifest = step / integrity.MANIFEST
    if data.draw(st.booleans()):
      manifest.write_bytes(data.draw(spoiled(manifest.read_bytes())))
    with contextlib.suppress(checkpoint.CheckpointError):
      checkpoint.describe(step)

  return target


def _packed_record(data) -> None:
  meta = {
    **{name: "x" for name in array_record._PLAIN},
    "expressions": ["a"],
    "conversation": [],
    "options": [["b"]],
    "size": [20, 30],
    "image_keys": ["k"],
  }
  new = data.draw(spoiled(json.dumps(meta).encode()))
  with contextlib.suppress(DataError):
    array_record.decode({"meta": new, "images": [], "seg_masks": [b""]}, 0)


TARGETS = {
  **{name: lambda name=name: _layout(name) for name in layouts.LAYOUTS},
  "segmentations": lambda: _segmentations,
  "picture": lambda: _picture,
  "conversation": lambda: _conversation,
  "safetensors": _safetensors,
  "weights_folder": _weights_folder,
  "codes": _codes,
  "predictions": _predictions,
  "text_tokenizer": _text_tokenizer,
  "checkpoint": _checkpoint,
  "packed_record": lambda: _packed_record,
}


def test_of(name: str, **settings) -> Callable[[], None]:
  """A target as a hypothesis test without arguments."""
  target = TARGETS[name]()

  @hypothesis.settings(
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    **settings,
  )
  @hypothesis.given(st.data())
  def test(data):
    target(data)

  return test


def _main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument("--minutes", type=float, default=10)
  parser.add_argument("targets", nargs="*")
  args = parser.parse_args()
  failed = 0
  for name in args.targets or TARGETS:
    test = test_of(name, max_examples=200)
    end, rounds = time.monotonic() + 60 * args.minutes, 0
    while time.monotonic() < end:
      seed = int.from_bytes(np.random.bytes(6), "little")
      try:
        hypothesis.seed(seed)(test)()
      except Exception as error:
        failed += 1
        print(f"{name} seed {seed}: {type(error).__name__}: {error}")
        print("\n".join(getattr(error, "__notes__", ())), flush=True)
        break
      rounds += 1
    print(f"{name}: {200 * rounds} examples", flush=True)
  return int(failed > 0)


if __name__ == "__main__":
  sys.exit(_main())
