"""Images without requests: what an image tokenizer alone trains on."""

import dataclasses
import pathlib

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.parsing import digest
from argenseg_jax.data.sources.sample import Sample, Source
from argenseg_jax.runtime import paths

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class ImageFolderSource:
  """Every image file below a folder, in the order of their names.

  Each is its sample's image and its mask: what it is taken for, the run says.

  Args:
    path: the folder.
  """

  has_options = False
  has_turns = False
  notes = ()

  def __init__(self, path: str | pathlib.Path):
    self.path = paths.as_path(path)
    found = self.path.rglob("*") if self.path.is_dir() else ()
    self._files = sorted(
      p
      for p in found
      if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")
    )
    if not self._files:
      raise DataError(
        f"{self.path} contains no images ({', '.join(_SUFFIXES)}), at no depth."
      )
    names = (f"{p.relative_to(self.path)} {paths.size(p)}" for p in self._files)
    self.fingerprint = digest("\n".join(names))

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "ImageFolderSource":
    return cls(path)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Sample:
    file = self._files[index]
    return Sample(
      index=index,
      dataset=self.path.name,
      images=(file,),
      seg_masks=(file,),
      kind="image",
      image_keys=(str(file),),
      where=str(file),
    )


class ImageTargets:
  """The first image of each record as what is to be encoded and decoded.

  Records whose target is an image already keep it.

  Args:
    source: the records.
  """

  has_options = False
  has_turns = False

  def __init__(self, source: Source):
    self._source = source
    self.fingerprint = digest(source.fingerprint, "image targets")
    self.notes = source.notes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Sample:
    sample = self._source[index]
    if sample.target == "picture":
      return sample
    if not sample.images:
      raise DataError(f"{sample.where} has no image to train on.")
    return dataclasses.replace(
      sample,
      seg_masks=sample.images[:1],
      ignores=(),
      options=(),
      conversation=(),
      target="picture",
    )
