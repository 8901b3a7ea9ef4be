"""RefCOCO-M: RefCOCO's validation split with finer masks, in parquet."""

import functools
import pathlib
from typing import Any, NamedTuple

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.masks import whole_number
from argenseg_jax.data.sources.parsing import digest, required_text
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.data.sources.tfds_records import damage_named
from argenseg_jax.runtime import paths

_KEPT_GROUPS = 2  # Row groups whose images stay in memory.
_COLUMNS = ("image", "image_id", "samples")


class _Place(NamedTuple):
  """Where an object stands."""

  file: int
  group: int
  row: int  # Of its row group.
  image: Any  # Its id.
  object: dict[str, Any]


class RefcocoMSource:
  """Objects of images, each with its wordings and COCO run lengths.

  A row of the parquet files holds an image and "samples", a list of objects
  with "id", "sentences" and "mask" ({"counts", "size"}). Images are read a row
  group at a time: in order that is quick, shuffled it is not (pack them with
  `argenseg data build` for training).

  Args:
    path: a parquet file, or a folder with `SPLIT-*.parquet` in it or in `data`.
    split: "validation"; "val" means the same.
  """

  has_options = False
  has_turns = False
  notes = ()

  def __init__(self, path: str | pathlib.Path, split: str):
    self.path = paths.disk_path(path)
    split = {"val": "validation"}.get(split, split)
    self._files = _files(self.path, split)
    self._places: list[_Place] = []
    for number, file in enumerate(self._files):
      self._places += _places(file, number)
    if not self._places:
      raise DataError(f"{self.path} contains no objects of split {split!r}.")
    listing = "".join(f"{f.name} {paths.size(f)}\n" for f in self._files)
    objects = repr([place[3:] for place in self._places])
    self.fingerprint = digest(listing, objects)

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "RefcocoMSource":
    return cls(path, split)

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> Sample:
    place = self._places[index]
    found, file = place.object, self._files[place.file]
    where = f"{file} object {found.get('id')}"
    sentences = found.get("sentences") or ()
    mask = found.get("mask") or {}
    try:
      size = tuple(map(whole_number, mask["size"]))
      height, width = size
    except (KeyError, TypeError, ValueError) as error:
      raise DataError(f'{where} has a mask without "size".') from error
    with damage_named(file, place.row):
      image = self._images(place.file, place.group)[place.row]
    if not isinstance(image, bytes):
      raise DataError(f"{where} has no image.")
    return Sample(
      index=index,
      dataset="refcoco_m",
      images=(image,),
      seg_masks=(mask,),
      expressions=tuple(
        required_text(text, where, "expression") for text in sentences
      ),
      kind="referring",
      size=(height, width),
      image_keys=(place.image,),
      where=where,
    )

  @functools.cached_property
  def _images(self):
    """(file, row group) -> encoded images of its rows."""

    def read(file: int, group: int) -> list[bytes | None]:
      table = _parquet(self._files[file]).read_row_group(group, ["image"])
      rows = table.column("image").to_pylist()
      return [row["bytes"] if isinstance(row, dict) else row for row in rows]

    return functools.lru_cache(_KEPT_GROUPS)(read)

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_images"}


def _files(path: pathlib.Path, split: str) -> tuple[pathlib.Path, ...]:
  if path.suffix == ".parquet":
    return (path,)
  for folder in (path, path / "data"):
    if found := tuple(sorted(folder.glob(f"{split}-*.parquet"))):
      return found
  raise DataError(
    f"{path} contains no {split}-*.parquet, nor does its folder data; give the "
    "folder of RefCOCO-M and its split, validation."
  )


def _parquet(file: pathlib.Path) -> Any:
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise DataError(
      'parquet files need pyarrow: pip install "argenseg_jax[parquet]".'
    ) from error
  try:
    return parquet.ParquetFile(file)
  except Exception as error:  # pyarrow has errors of its own.
    raise DataError(
      f"{file} is not a parquet file: {paths.said(error)}."
    ) from error


def _places(file: pathlib.Path, number: int) -> list[_Place]:
  """The objects of a file, without its images."""
  opened = _parquet(file)
  names = opened.schema_arrow.names
  lacking = [name for name in _COLUMNS if name not in names]
  if lacking:
    raise DataError(f"{file} has no column {lacking[0]!r}, as RefCOCO-M has.")
  found = []
  for group in range(opened.num_row_groups):
    table = opened.read_row_group(group, ["image_id", "samples"])
    for row, record in enumerate(table.to_pylist()):
      found += [
        _Place(number, group, row, record["image_id"], entry)
        for entry in record["samples"] or ()
      ]
  return found
