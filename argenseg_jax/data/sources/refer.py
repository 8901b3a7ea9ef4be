"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO as they are distributed."""

import io
import pathlib
import pickle
import pickletools
from typing import Any

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import coco
from argenseg_jax.data.sources.parsing import (
  as_id,
  below,
  clean,
  digest,
  parse_json,
  read_file,
)
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.runtime.paths import Path, as_path


class _Builtins(pickle.Unpickler):
  """Reads lists, dictionaries, numbers and text; runs nothing."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _load_plain(raw: bytes) -> Any:
  """What a pickle holds; its memory is bounded by its length."""
  for opcode, argument, _ in pickletools.genops(raw):
    # Python makes room for as many objects as the largest number says.
    if not (opcode.name.endswith("PUT") and isinstance(argument, int)):
      continue
    if argument > len(raw):
      raise pickle.UnpicklingError(f"it numbers an object {argument}")
  return _Builtins(io.BytesIO(raw), encoding="latin1").load()


def _read(path: Path) -> bytes:
  return read_file(path, "give refs(...).p or grefs(...).json, or its folder")


def parse_refs(raw: bytes, path: Path) -> list[Any]:
  """The references of a `refs(...).p` or `grefs(...).json`.

  Args:
    raw: its bytes.
    path: its name, whose ending says which of the two.

  Raises:
    DataError: not such a file, or one that would run code.
  """
  if path.suffix == ".json":
    refs = parse_json(raw, str(path), list)
  else:
    try:
      refs = _load_plain(raw)
    except Exception as error:  # Anything can happen in a broken pickle.
      raise DataError(
        f"{path} is not a pickle of plain lists and dictionaries: {error}."
      ) from error
  if not isinstance(refs, list) or not any(map(_is_ref, refs)):
    raise DataError(
      f"{path} is not a list of references with {', '.join(_KEYS)}."
    )
  return refs


_KEYS = ("ann_id", "image_id", "ref_id", "sentences", "split")


def _is_ref(ref: Any) -> bool:
  return isinstance(ref, dict) and ref.keys() >= set(_KEYS)


class ReferSource:
  """A split of `refs(unc|umd|google).p` or `grefs(unc).json`.

  Beside it stands COCO's `instances.json` with images and annotations.
  gRefCOCO's several targets become one mask, their union; no target becomes a
  sample of kind "absent". References without a sentence are left out.

  Args:
    path: the file of references, or a folder that holds exactly one.
    split: "train", "val", "testA", ...
    root: of the images; by default `images` beside the file.
  """

  has_options = False
  has_turns = False
  pattern = "refs(*).p"

  def __init__(
    self,
    path: str | pathlib.Path,
    split: str,
    root: str | pathlib.Path | None = None,
  ):
    self.path = file = self._find(as_path(path))
    self.split = split
    self.root = as_path(root) if root else file.parent / "images"
    raw_refs = _read(file)
    self._refs, self.notes = _of_split(parse_refs(raw_refs, file), file, split)
    self._instances = coco.Instances(
      file.parent / "instances.json",
      images=_ids(self._refs, "image_id"),
      annotations=_ids(self._refs, "ann_id"),
    )
    self.fingerprint = digest(raw_refs, self._instances.fingerprint, split)

  def _find(self, path: Path) -> Path:
    """The file of references: `path`, or the only one in that folder."""
    if not path.is_dir():
      return path
    found = sorted(path.glob(self.pattern))
    if len(found) != 1:
      names = ", ".join(p.name for p in found) or "none"
      raise DataError(
        f"{path} must contain exactly one {self.pattern} (found: {names}); "
        "give the file itself."
      )
    return found[0]

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "ReferSource":
    return cls(path, split, root)

  def __len__(self) -> int:
    return len(self._refs)

  def __getitem__(self, index: int) -> Sample:
    ref = self._refs[index]
    where = f"{self.path} {_name(ref, index)}"
    expressions, image, targets = _parsed(ref, where)
    found = self._instances.image(image, where)
    file = below(self.root, found.file_name, where)
    segmentations = tuple(
      self._instances.segmentation(number, image, where) for number in targets
    )
    absent = bool(ref.get("no_target")) or not segmentations  # -1: none.
    if absent and segmentations:
      raise DataError(f"{where} has annotations although it has no target.")
    if len(segmentations) > 1:
      segmentations = (masks.Union(segmentations),)
    return Sample(
      index=index,
      dataset=self.path.parent.name,
      images=(file,),
      seg_masks=() if absent else segmentations,
      expressions=expressions,
      kind="absent" if absent else "referring",
      size=found.size,
      image_keys=(str(file),),
      where=where,
    )


class GrefSource(ReferSource):
  """gRefCOCO's file of references is JSON."""

  pattern = "grefs(*).json"


def _of_split(
  refs: list[Any], path: Path, split: str
) -> tuple[list[Any], tuple[str, ...]]:
  """The references of a split that have sentences, and what was left out.

  One without a split that can be read stays, to be named as a bad record.
  """
  kept, splits, silent = [], set(), 0
  for ref in refs:
    name = ref.get("split") if isinstance(ref, dict) else None
    if isinstance(name, str):
      splits.add(name)
      if name != split:
        continue
      if not ref.get("sentences", True):
        silent += 1
        continue
    kept.append(ref)
  if split not in splits:
    known = ", ".join(sorted(splits))
    raise DataError(f"{path} has no split {split!r}; it has {known}.")
  if not kept:
    raise DataError(f"{path} has no sentence in split {split!r}.")
  if not silent:
    return kept, ()
  return kept, (f"{path}: {silent} references without a sentence left out.",)


def _name(ref: Any, index: int) -> str:
  """Of a reference, for messages; a pickle's content is never printed."""
  number = ref.get("ref_id") if isinstance(ref, dict) else None
  if isinstance(number, str):
    return f"ref_id {number[:40]}"
  if isinstance(number, int) and abs(number) < 1 << 63:
    return f"ref_id {number}"
  return f"reference {index} of its split"


def _parsed(
  ref: Any, where: str
) -> tuple[tuple[str, ...], int | str, tuple[int | str, ...]]:
  """Sentences, image and annotations of a reference."""
  if not isinstance(ref, dict):
    raise DataError(f"{where} is no dictionary.")
  lacking = [key for key in _KEYS if ref.get(key) is None and key != "ann_id"]
  if lacking or not isinstance(ref["split"], str):
    raise DataError(f"{where} lacks {(lacking or ['split'])[0]!r}.")
  try:
    expressions = tuple(_sentence(s) for s in ref["sentences"])
  except (KeyError, TypeError, AttributeError) as error:
    raise DataError(f"{where} has a sentence that is no text.") from error
  try:
    image = as_id(ref["image_id"])
    targets = tuple(as_id(n) for n in as_tuple(ref.get("ann_id")))
    if not targets and not ref.get("no_target"):
      raise DataError(f"{where} names no annotation.")
  except DataError:
    raise
  except (TypeError, ValueError, OverflowError) as error:
    raise DataError(
      f"{where} has an image_id or ann_id that is no id."
    ) from error
  return expressions, image, tuple(n for n in targets if n != -1)


def _sentence(value: Any) -> str:
  sent = value["sent"]
  if not isinstance(sent, str):
    raise TypeError
  return clean(sent)


def _ids(refs: list[Any], key: str) -> set[int | str]:
  """All ids that references name under a key."""
  found = set()
  for ref in refs:
    for value in as_tuple(ref.get(key) if isinstance(ref, dict) else None):
      try:
        found.add(as_id(value))
      except (TypeError, ValueError, OverflowError):
        continue  # Named when the reference is read.
  return found


def as_tuple(value: Any) -> tuple:
  """One value, several, or none."""
  if value is None:
    return ()
  return tuple(value) if isinstance(value, (list, tuple)) else (value,)
