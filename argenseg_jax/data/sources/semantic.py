"""Semantic data sets: one class of the picture is asked for at each visit."""

import pathlib

import numpy as np

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import (
  Option,
  Sample,
  below,
  digest,
  parse_json,
  read_file,
)
from argenseg_jax.runtime import paths


class CocoPanopticSource:
  """COCO panoptic: a json of segments and a folder of PNGs beside it.

  Things of one class become one mask, as the stuff classes are.

  Args:
    path: `panoptic_train2017.json`; its PNGs are in `panoptic_train2017/`.
    root: of the pictures; by default `images` beside the json.
  """

  def __init__(
    self, path: str | pathlib.Path, root: str | pathlib.Path | None = None
  ):
    self.path = paths.as_path(path)
    self.root = paths.as_path(root) if root else self.path.parent / "images"
    raw = read_file(self.path, "give the json of COCO panoptic")
    coco = parse_json(raw, str(self.path), dict)
    try:
      self._names = {
        c["id"]: c["name"].replace("-other", "").replace("-merged", "")
        for c in coco["categories"]
      }
      self._images = {i["id"]: i for i in coco["images"]}
      self._annotations = list(coco["annotations"])
    except (KeyError, TypeError, AttributeError) as error:
      raise DataError(
        f"{self.path} is not COCO panoptic: it lacks {error}."
      ) from error
    self.fingerprint = digest(raw)

  def __len__(self) -> int:
    return len(self._annotations)

  def __getitem__(self, index: int) -> Sample:
    annotation = self._annotations[index]
    where = f"{self.path} annotation {index}"
    segments: dict[str, list[int]] = {}
    try:
      picture = self._images[annotation["image_id"]]
      file = below(self.root, picture["file_name"], where)
      labels = self.path.with_suffix("")
      png = below(labels, annotation["file_name"], where)
      for segment in annotation["segments_info"]:
        name = self._names[segment["category_id"]]
        segments.setdefault(name, []).append(int(segment["id"]))
    except ValueError as error:
      if isinstance(error, DataError):
        raise
      raise DataError(
        f"{where} has a segment whose id is no number."
      ) from error
    except (KeyError, TypeError) as error:
      raise DataError(f"{where} lacks {error}.") from error
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

  def __init__(self, path: str | pathlib.Path, split: str):
    self.path = paths.as_path(path)
    folder = {"train": "training", "val": "validation"}.get(split, split)
    self._labels = sorted((self.path / "annotations" / folder).glob("*.png"))
    if not self._labels:
      raise DataError(
        f"{self.path / 'annotations' / folder} holds no PNGs; give the folder "
        "ADEChallengeData2016 and one of its splits."
      )
    self._pictures = self.path / "images" / folder
    raw = read_file(self.path / "objectInfo150.txt", "ADE20K's class names")
    self._names = {}
    for line in raw.decode("utf-8", "replace").splitlines()[1:]:
      number, _, rest = line.partition("\t")
      names = rest.rpartition("\t")[2]
      if not (number.strip().isascii() and number.strip().isdecimal()):
        raise DataError(
          f"{self.path / 'objectInfo150.txt'} has the line {line[:40]!r}, not "
          "a number, a tab and names."
        )
      self._names[int(number[:9])] = names.split(",")[0].strip()
    listing = "".join(f"{p.name} {paths.size(p)}\n" for p in self._labels)
    self.fingerprint = digest(raw, listing)

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Sample:
    png = self._labels[index]
    present = np.unique(masks.decode_ids(png, colour=False))
    unknown = [int(v) for v in present if v and int(v) not in self._names]
    if unknown:
      raise DataError(
        f"{png} holds class {unknown[0]}, which objectInfo150.txt does not."
      )
    return _semantic(
      index,
      "ade20k",
      self._pictures / f"{png.stem}.jpg",
      {
        self._names[int(v)]: masks.Segment(png, (int(v),)) for v in present if v
      },
      str(png),
    )


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
