"""Small files in every layout that `DataConfig.source` knows.

Two images of 30 x 20 pixels, a left and a right box in each.
"""

import json
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.config import DataConfig
from argenseg_jax.data import masks, text
from argenseg_jax.data.example_builder import RowMaker
from argenseg_jax.data.sources.registry import open_source

SIZE = (20, 30)
LEFT = np.zeros(SIZE, bool)
LEFT[3:9, 4:12] = True
RIGHT = np.zeros(SIZE, bool)
RIGHT[10:18, 18:28] = True
_IMAGES = ("a.jpg", "b.jpg")


def write(layout: str, folder: pathlib.Path) -> dict[str, Any]:
  """Writes a layout and returns the keys of `DataConfig` that open it."""
  return {"source": layout, **_WRITERS[layout](folder)}


def rows(**keys) -> RowMaker:
  """Opens them as rows with text, small unless `keys` say otherwise."""
  small: dict[str, Any] = {
    "sequence_length": 400,
    "image_side": 16,
    "mask_side": 16,
    "mask_channels": 1,
    "max_masks": 2,
  }
  config = DataConfig(**(small | keys))
  return RowMaker(
    open_source(config),
    config,
    tokenizer=text.TextTokenizer(),
    image_tokens=4,
    num_codes=5,
  )


def image(path: pathlib.Path, seed: int) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), np.uint8)
  pixels[LEFT], pixels[RIGHT] = (255, 0, 0), (0, 0, 255)
  Image.fromarray(pixels).save(path)


def mask(path: pathlib.Path, pixels: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels.astype(np.uint8) * 255).save(path)


def box(pixels: np.ndarray) -> list[float]:
  """COCO polygon of a box."""
  rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
  top, bottom = float(rows[0]), float(rows[-1] + 1)
  left, right = float(columns[0]), float(columns[-1] + 1)
  return [left, top, right, top, right, bottom, left, bottom]


def _images(folder: pathlib.Path) -> None:
  for number, name in enumerate(_IMAGES):
    image(folder / name, number)


def _instances(folder: pathlib.Path) -> None:
  _images(folder / "images")
  height, width = SIZE
  content = {
    "images": [
      {"id": i, "file_name": name, "height": height, "width": width}
      for i, name in enumerate(_IMAGES)
    ],
    "annotations": [
      {"id": 10 * i + j, "image_id": i, "segmentation": [box(pixels)]}
      for i in range(2)
      for j, pixels in enumerate((LEFT, RIGHT))
    ],
  }
  (folder / "instances.json").write_text(json.dumps(content))


def _ref(number: int, annotations: Any, split: str, **more) -> dict:
  sentences = [{"sent": "left box"}, {"sent": "the red one"}]
  return {
    "ref_id": number,
    "ann_id": annotations,
    "image_id": number % 2,
    "split": split,
    "sentences": sentences,
    **more,
  }


def _refer(folder):
  _instances(folder)
  refs = [_ref(0, 0, "train"), _ref(1, 10, "train"), _ref(2, 0, "val")]
  with (folder / "refs(unc).p").open("wb") as file:
    pickle.dump(refs, file, 2)
  return {"path": str(folder)}


def _grefer(folder):
  _instances(folder)
  refs = [
    _ref(0, [0, 1], "train", no_target=False),
    _ref(1, [-1], "train", no_target=True),
    _ref(2, [0], "val", no_target=False),
  ]
  (folder / "grefs(unc).json").write_text(json.dumps(refs))
  return {"path": str(folder)}


def _reason_seg(folder):
  corners = [[4, 3], [11, 3], [11, 8], [4, 8]]
  shapes = [
    {"label": "target", "points": corners},
    {"label": "ignore", "points": [[18, 10], [27, 10], [27, 17]]},
    {"label": "flag", "points": [[0, 0], [29, 0], [29, 19], [0, 19]]},
  ]
  record = {"text": ["what is warm"], "is_sentence": False, "shapes": shapes}
  for name in _IMAGES:
    image(folder / "train" / name, 0)
    (folder / "train" / name).with_suffix(".json").write_text(
      json.dumps(record)
    )
  return {"path": str(folder)}


def chat(asked: str, answer: str) -> list[dict]:
  return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def jsonl_records(folder: pathlib.Path) -> list[dict]:
  """One record of each sort: one and two masks, two turns, question, text."""
  _images(folder)
  for name, pixels in (("left.png", LEFT), ("right.png", RIGHT)):
    mask(folder / "masks" / name, pixels)
  left, right = "masks/left.png", "masks/right.png"
  one = chat("<image>\nthe left box", "<mask>")
  more = chat("and the right one?", "It is blue: <mask>")
  return [
    {"image": "a.jpg", "mask": left, "conversations": one},
    {
      "image": "b.jpg",
      "mask": [left, right],
      "conversations": chat("<image>\nboth boxes", "<mask> and <mask>"),
    },
    {"image": "a.jpg", "mask": [left, right], "conversations": one + more},
    {"image": "b.jpg", "conversations": chat("<image>\nhow many?", "two")},
    {"conversations": chat("hello", "good day")},
  ]


def write_lines(path: pathlib.Path, records: list) -> pathlib.Path:
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def _jsonl(folder):
  path = write_lines(folder / "data.jsonl", jsonl_records(folder))
  return {"path": str(path), "max_masks": 2}


def _meta(folder):
  _jsonl(folder)
  (folder / "refs").mkdir()
  _refer(folder / "refs")
  content = {
    "chat": {"root": "", "annotation": "data.jsonl", "length": 5},
    "refs": {"annotation": "refs", "source": "refer", "repeat_time": 5},
  }
  path = folder / "meta.json"
  path.write_text(json.dumps(content))
  return {"path": str(path), "max_masks": 2}


def _coco_panoptic(folder):
  _images(folder / "images")
  ids = np.zeros((*SIZE, 3), np.uint8)
  ids[LEFT], ids[RIGHT] = (1, 2, 0), (7, 0, 1)
  segments = [{"id": 513, "category_id": 1}, {"id": 65543, "category_id": 2}]
  annotations = []
  for number, name in enumerate(_IMAGES):
    file = pathlib.Path(name).with_suffix(".png")
    path = folder / "panoptic" / file
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(ids).save(path)
    annotations.append(
      {
        "image_id": number,
        "file_name": str(file),
        "segments_info": segments,
      }
    )
  content = {
    "images": [{"id": i, "file_name": n} for i, n in enumerate(_IMAGES)],
    "categories": [
      {"id": 1, "name": "person"},
      {"id": 2, "name": "floor-other-merged"},
    ],
    "annotations": annotations,
  }
  (folder / "panoptic.json").write_text(json.dumps(content))
  return {"path": str(folder / "panoptic.json")}


def _ade20k(folder):
  _images(folder / "images" / "training")
  labels = (LEFT * 1 + RIGHT * 3).astype(np.uint8)
  for name in _IMAGES:
    path = folder / "annotations" / "training" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path.with_suffix(".png"))
  (folder / "objectInfo150.txt").write_text(
    "Idx\tRatio\tTrain\tVal\tName\n1\t0.2\t1\t1\twall\n"
    "3\t0.1\t1\t1\tsky, heaven\n"
  )
  return {"path": str(folder)}


def _text_to_image(folder):
  _images(folder)
  records = [{"image": "a.jpg", "text": "a box"}]
  records += [{"image": "b.jpg", "caption": "two boxes"}]
  path = write_lines(folder / "pairs.jsonl", records)
  return {"path": str(path), "mask_channels": 3}


def _folder(folder):
  _images(folder)
  mask(folder / "a.png", LEFT)
  mask(folder / "b.png", np.zeros(SIZE, bool))
  (folder / "a.txt").write_text("left box\nthe red one\n")
  (folder / "b.txt").write_text("a cat\n")
  return {"path": str(folder)}


def _refcoco_m(folder):
  """As its page describes the parquet files; two row groups."""
  arrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  _images(folder / "images")
  rows = [
    {
      "image": {"bytes": (folder / "images" / name).read_bytes(), "path": name},
      "image_id": number,
      "file_name": name,
      "samples": [
        {
          "id": 10 * number + j,
          "sentences": ["left box", "the red one"],
          "mask": masks.run_lengths(pixels),
        }
        for j, pixels in enumerate((LEFT, RIGHT))
      ],
    }
    for number, name in enumerate(_IMAGES)
  ]
  (folder / "data").mkdir(exist_ok=True)
  parquet.write_table(
    arrow.Table.from_pylist(rows),
    folder / "data" / "train-00000-of-00001.parquet",
    row_group_size=1,
  )
  return {"path": str(folder)}


_WRITERS = {
  "refer": _refer,
  "grefer": _grefer,
  "reason_seg": _reason_seg,
  "jsonl": _jsonl,
  "meta": _meta,
  "coco_panoptic": _coco_panoptic,
  "ade20k": _ade20k,
  "text_to_image": _text_to_image,
  "folder": _folder,
  "refcoco_m": _refcoco_m,
}
LAYOUTS = tuple(_WRITERS)
