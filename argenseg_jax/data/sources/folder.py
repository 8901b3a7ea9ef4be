"""A plain folder of images, masks and requests."""

import collections
import dataclasses
import pathlib

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.parsing import digest, read_file, text_lines
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.runtime import paths

_IMAGES = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class FolderSource:
  """`name.jpg`, `name.png` (the mask) and `name.txt`, one wording a line.

  A mask that is black all over says that there is no such thing. Files whose
  names begin with a dot are left alone.

  Args:
    path: the folder.
  """

  has_options = False
  has_turns = False

  def __init__(self, path: str | pathlib.Path):
    self.path = paths.as_path(path)
    found = sorted(self.path.iterdir()) if self.path.is_dir() else []
    found = [p for p in found if not p.name.startswith(".")]
    self._images = [p for p in found if p.suffix.lower() in _IMAGES]
    if not self._images:
      raise DataError(
        f"{self.path} contains no images ({', '.join(_IMAGES)}) with a .png "
        "and a .txt of the same name."
      )
    self._counts = collections.Counter(p.stem for p in self._images)
    alone = [
      p.name
      for p in found
      if p.suffix in (".png", ".txt") and p.stem not in self._counts
    ]
    self.notes = ()
    if alone:
      self.notes = (
        f"{self.path}: {len(alone)} files without an image of their name left "
        f"out ({', '.join(alone[:3])}{', ...' if len(alone) > 3 else ''}).",
      )
    parts = []
    for image in self._images:
      for file in (image, *_partners(image)):
        size = paths.size(file) if file.is_file() else -1
        parts.append(f"{file.name} {size}")
    self.fingerprint = digest("\n".join(parts))

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "FolderSource":
    return cls(path)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Sample:
    image = self._images[index]
    if self._counts[image.stem] > 1:
      raise DataError(
        f"{image} is one of several images named {image.stem!r}, which would "
        "share a mask and a text."
      )
    mask, note = _partners(image)
    raw = read_file(note, "write one wording a line")
    sample = Sample(
      index=index,
      dataset=self.path.name,
      images=(image,),
      seg_masks=(mask,),
      expressions=tuple(text_lines(raw, str(note))),
      kind="referring",
      image_keys=(str(image),),
      where=str(image),
    )
    if sample.load_seg_mask().any():
      return sample
    return dataclasses.replace(sample, seg_masks=(), kind="absent")


def _partners(image: paths.Path) -> tuple[paths.Path, paths.Path]:
  return image.with_suffix(".png"), image.with_suffix(".txt")
