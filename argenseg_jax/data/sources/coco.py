"""COCO's `instances.json`: images and annotations by their ids."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.parsing import (
  as_id,
  as_size,
  digest,
  parse_json,
  read_file,
)
from argenseg_jax.runtime.paths import Path

_BAD_ID = (KeyError, TypeError, ValueError, OverflowError)


class Image(NamedTuple):
  """An image of an annotation file."""

  file_name: Any
  size: tuple[int, int]  # Height and width.


class Entries:
  """Entries of a list of an annotation file by their ids.

  An id that stands twice with different contents is remembered as doubtful:
  whoever asks for it is refused.

  Args:
    entries: dictionaries with an "id".
    wanted: ids to keep; None keeps all.
    noun: what an entry is, for messages.
    file: that they come from.
  """

  def __init__(
    self,
    entries: Any,
    noun: str,
    file: Path,
    wanted: set[int | str] | None = None,
  ):
    if not isinstance(entries, list):
      raise DataError(f"{file} has no list of {noun}s.")
    self._noun = noun
    self._file = file
    self._found: dict[int | str, dict[str, Any]] = {}
    self._twice: set[int | str] = set()
    self.malformed = 0
    for entry in entries:
      try:
        number = as_id(entry["id"])
      except _BAD_ID:
        self.malformed += 1
        continue
      if wanted is not None and number not in wanted:
        continue
      if self._found.setdefault(number, entry) != entry:
        self._twice.add(number)

  def get(self, number: int | str, where: str) -> dict[str, Any]:
    """The entry of an id; DataError where there is none or several."""
    if number in self._twice:
      raise DataError(
        f"{where} names {self._noun} {number}, which stands in {self._file} "
        "several times with different contents."
      )
    if number not in self._found:
      raise DataError(
        f"{where} names {self._noun} {number}, which {self._file} does not "
        "hold."
      )
    return self._found[number]

  def ids(self) -> Iterable[int | str]:
    return self._found


class Instances:
  """Images and annotations that references name.

  Args:
    path: of `instances.json`.
    images, annotations: the ids that will be asked for.
  """

  def __init__(
    self, path: Path, *, images: set[int | str], annotations: set[int | str]
  ):
    raw = read_file(path, "put COCO's annotations beside the refs")
    content = parse_json(raw, str(path), dict)
    self._images = Entries(content.get("images"), "image", path, images)
    self._annotations = Entries(
      content.get("annotations"), "annotation", path, annotations
    )
    self.fingerprint = digest(raw)

  def image(self, number: int | str, where: str) -> Image:
    """An image; DataError where it is missing, doubtful or malformed."""
    return image_of(self._images.get(number, where), number, where)

  def segmentation(
    self, number: int | str, image: int | str, where: str
  ) -> Any:
    """The stored mask of an annotation of an image.

    Raises:
      DataError: it is missing, doubtful, or of another image.
    """
    annotation = self._annotations.get(number, where)
    if "image_id" in annotation:
      try:
        own = as_id(annotation["image_id"])
      except _BAD_ID as error:
        raise DataError(
          f"{where}: annotation {number} has an image_id that is no id."
        ) from error
      if own != image:
        raise DataError(
          f"{where} is of image {image}, but its annotation {number} of image "
          f"{own}."
        )
    found = annotation.get("segmentation")
    if not isinstance(found, (list, dict)) or not found:
      raise DataError(f'{where}: annotation {number} has no "segmentation".')
    return found


def image_of(entry: dict[str, Any], number: int | str, where: str) -> Image:
  """What an entry of "images" says; DataError where it does not."""
  try:
    return Image(entry["file_name"], as_size(entry))
  except _BAD_ID as error:
    raise DataError(
      f'{where}: image {number} needs "file_name", "height" and "width" '
      f"({type(error).__name__}: {error})."
    ) from error
