"""Semantic data sets: one class of the image is asked for at each visit."""

import pathlib
import re

import numpy as np

from argenseg_jax.data import mask_image, masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.coco import Entries
from argenseg_jax.data.sources.parsing import (
  as_id,
  as_utf8,
  below,
  digest,
  parse_json,
  read_file,
  required_text,
)
from argenseg_jax.data.sources.sample import Option, Sample
from argenseg_jax.runtime import paths


class CocoPanopticSource:
  """COCO panoptic: a json of segments and a folder of PNGs beside it.

  Things of one class become one mask, as the stuff classes are.

  Args:
    path: `panoptic_train2017.json`; its PNGs are in `panoptic_train2017/`.
    root: of the images; by default `images` beside the json.
  """

  has_options = True
  has_turns = False
  notes = ()

  def __init__(
    self, path: str | pathlib.Path, root: str | pathlib.Path | None = None
  ):
    self.path = paths.as_path(path)
    self.root = paths.as_path(root) if root else self.path.parent / "images"
    raw = read_file(self.path, "give the json of COCO panoptic")
    coco = parse_json(raw, str(self.path), dict)
    lacking = [
      key
      for key in ("categories", "images", "annotations")
      if not isinstance(coco.get(key), list)
    ]
    if lacking:
      raise DataError(
        f"{self.path} is not COCO panoptic: it lacks {lacking[0]!r}."
      )
    self._categories = Entries(coco["categories"], "category", self.path)
    self._images = Entries(coco["images"], "image", self.path)
    self._annotations = coco["annotations"]
    self.fingerprint = digest(raw)

  @classmethod
  def open(
    cls, path: str, split: str, root: str | None
  ) -> "CocoPanopticSource":
    return cls(path, root)

  def __len__(self) -> int:
    return len(self._annotations)

  def __getitem__(self, index: int) -> Sample:
    annotation = self._annotations[index]
    where = f"{self.path} annotation {index}"
    try:
      number = as_id(annotation["image_id"])
      name = annotation["file_name"]
      parts = [
        (as_id(part["id"]), as_id(part["category_id"]))
        for part in annotation["segments_info"]
      ]
    except (KeyError, TypeError) as error:
      raise DataError(f"{where} lacks {error}.") from error
    except (ValueError, OverflowError) as error:
      raise DataError(f"{where} has an id that is no number.") from error
    where = f"{where} of image {number}"
    image = self._images.get(number, where)
    file = below(self.root, image.get("file_name"), where)
    png = below(self.path.with_suffix(""), name, where)
    segments: dict[str, list[int]] = {}
    seen = set()
    for segment, category in parts:
      if not isinstance(segment, int):
        raise DataError(f"{where} has a segment whose id is no number.")
      if segment in seen:
        raise DataError(f"{where} has segment {segment} twice.")
      seen.add(segment)
      entry = self._categories.get(category, where)
      label = required_text(entry.get("name"), where, "category name")
      label = label.replace("-other", "").replace("-merged", "")
      segments.setdefault(label, []).append(segment)
    return _semantic(
      index,
      "coco_panoptic",
      file,
      {n: masks.Segment(png, tuple(v), True) for n, v in segments.items()},
      where,
    )


class Ade20kSource:
  """ADEChallengeData2016: `images/`, `annotations/`, `objectInfo150.txt`.

  Args:
    path: its folder.
    split: "training" or "validation"; "train" and "val" mean the same.
  """

  has_options = True
  has_turns = False
  notes = ()

  def __init__(self, path: str | pathlib.Path, split: str):
    self.path = paths.as_path(path)
    folder = {"train": "training", "val": "validation"}.get(split, split)
    self._labels = sorted((self.path / "annotations" / folder).glob("*.png"))
    if not self._labels:
      raise DataError(
        f"{self.path / 'annotations' / folder} contains no PNGs; give the "
        "folder ADEChallengeData2016 and one of its splits."
      )
    self._folder = self.path / "images" / folder
    info = self.path / "objectInfo150.txt"
    raw = read_file(info, "ADE20K's class names")
    self._names = _class_names(as_utf8(raw, str(info)), info)
    listing = "".join(f"{p.name} {paths.size(p)}\n" for p in self._labels)
    self.fingerprint = digest(raw, listing)

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "Ade20kSource":
    return cls(path, split)

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Sample:
    png = self._labels[index]
    present = np.unique(mask_image.read_ids(png, color=False)).tolist()
    unknown = [v for v in present if v and v not in self._names]
    if unknown:
      raise DataError(
        f"{png} contains class {unknown[0]}, which objectInfo150.txt does not."
      )
    classes: dict[str, list[int]] = {}
    for value in filter(None, present):
      classes.setdefault(self._names[value], []).append(value)
    return _semantic(
      index,
      "ade20k",
      self._folder / f"{png.stem}.jpg",
      {n: masks.Segment(png, tuple(v)) for n, v in classes.items()},
      str(png),
    )


def _class_names(text: str, info: paths.Path) -> dict[int, str]:
  """Numbers of classes and their first names."""
  found = {}
  for line in filter(str.strip, re.split(r"\r\n|\r|\n", text)[1:]):
    number, _, rest = line.partition("\t")
    name = rest.rpartition("\t")[2].split(",")[0].strip()
    if not (number.strip().isascii() and number.strip().isdecimal() and name):
      raise DataError(
        f"{info} has the line {line[:40]!r}, not a number, a tab and names."
      )
    value = int(number[:9])
    if found.setdefault(value, name) != name:
      raise DataError(f"{info} names class {value} twice.")
  return found


def _semantic(
  index: int,
  dataset: str,
  file: paths.Path,
  classes: dict[str, masks.Segment],
  where: str,
) -> Sample:
  if not classes:
    raise DataError(f"{where} marks no class.")
  return Sample(
    index=index,
    dataset=dataset,
    images=(file,),
    seg_masks=(),
    options=tuple(Option((name,), mask) for name, mask in classes.items()),
    request="semantic",
    kind="semantic",
    image_keys=(str(file),),
    where=where,
  )
