"""A plain folder of pictures, masks and requests."""

import pathlib

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import Sample, digest, read_file
from argenseg_jax.runtime import paths

_PICTURES = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class FolderSource:
  """`name.jpg`, `name.png` (the mask) and `name.txt`, one wording a line.

  A mask that is black all over says that there is no such thing.

  Args:
    path: the folder.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = paths.as_path(path)
    found = self.path.iterdir() if self.path.is_dir() else ()
    self._pictures = sorted(p for p in found if p.suffix.lower() in _PICTURES)
    if not self._pictures:
      raise DataError(
        f"{self.path} holds no pictures ({', '.join(_PICTURES)}) with a .png "
        "and a .txt of the same name."
      )
    parts = []
    for picture in self._pictures:
      for file in (picture, *_partners(picture)):
        size = paths.size(file) if file.is_file() else -1
        parts.append(f"{file.name} {size}")
    self.fingerprint = digest("\n".join(parts))

  def __len__(self) -> int:
    return len(self._pictures)

  def __getitem__(self, index: int) -> Sample:
    picture = self._pictures[index]
    mask, note = _partners(picture)
    try:
      lines = read_file(note, "write one wording a line").decode("utf-8")
    except UnicodeDecodeError as error:
      raise DataError(f"{note} is not UTF-8 text.") from error
    sample = Sample(
      index=index,
      dataset=self.path.name,
      images=(picture,),
      seg_masks=(mask,),
      expressions=tuple(s.strip() for s in lines.splitlines() if s.strip()),
      kind="referring",
      image_keys=(str(picture),),
      where=str(picture),
    )
    if sample.load_seg_mask().any():
      return sample
    return Sample(**(vars(sample) | {"seg_masks": (), "kind": "absent"}))


def _partners(picture: paths.Path) -> tuple[paths.Path, paths.Path]:
  return picture.with_suffix(".png"), picture.with_suffix(".txt")
