"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO as they are distributed."""

import io
import pathlib
import pickle
import pickletools
from typing import Any

from argenseg_jax.data import masks
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import (
  Sample,
  below,
  digest,
  parse_json,
  read_file,
)
from argenseg_jax.runtime.paths import Path, as_path


class _Builtins(pickle.Unpickler):
  """Reads lists, dictionaries, numbers and text; runs nothing."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _load_plain(raw: bytes) -> Any:
  """What a pickle holds; its memory is bounded by its length."""
  for opcode, argument, _ in pickletools.genops(raw):
    # Python makes room for as many objects as the largest number says.
    if opcode.name.endswith("PUT") and argument > len(raw):
      raise pickle.UnpicklingError(f"it numbers an object {argument}")
  return _Builtins(io.BytesIO(raw), encoding="latin1").load()


def read_refs(path: Path) -> list[dict[str, Any]]:
  """The references of a `refs(...).p` or `grefs(...).json`.

  Raises:
    DataError: unreadable, not such a file, or one that would run code.
  """
  raw = read_file(path, "give refs(...).p or grefs(...).json, or its folder")
  if path.suffix == ".json":
    refs = parse_json(raw, str(path), list)
  else:
    try:
      refs = _load_plain(raw)
    except Exception as error:  # Anything can happen in a broken pickle.
      raise DataError(
        f"{path} is not a pickle of plain lists and dictionaries: {error}."
      ) from error
  if not isinstance(refs, list) or not all(map(_is_ref, refs)):
    raise DataError(
      f"{path} is not a list of references with {', '.join(sorted(_KEYS))}."
    )
  return refs


_KEYS = {"ref_id", "ann_id", "image_id", "split", "sentences"}


def _is_ref(ref: Any) -> bool:
  """Numbers and text only where one is needed: what a pickle holds may be
  shared a thousandfold, and be endless when it is printed."""
  return (
    isinstance(ref, dict)
    and ref.keys() >= _KEYS
    and isinstance(ref["split"], str)
    and _is_number(ref["image_id"])
    and _is_number(ref["ref_id"])
    and all(map(_is_number, _as_tuple(ref["ann_id"])))
  )


def _is_number(value: Any) -> bool:
  return isinstance(value, int) and abs(value) < 1 << 63


class ReferSource:
  """A split of `refs(unc|umd|google).p` or `grefs(unc).json`.

  Beside it stands COCO's `instances.json` with pictures and annotations.
  gRefCOCO's several targets become one mask, their union; no target becomes a
  sample of kind "absent".

  Args:
    path: the file of references, or a folder that holds exactly one.
    split: "train", "val", "testA", ...
    root: of the pictures; by default `images` beside the file.
  """

  def __init__(
    self,
    path: str | pathlib.Path,
    split: str,
    root: str | pathlib.Path | None = None,
    pattern: str = "refs(*).p",
  ):
    path = as_path(path)
    if path.is_dir():
      found = sorted(path.glob(pattern))
      if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise DataError(
          f"{path} must hold one {pattern}, it holds {names}; give the file."
        )
      (path,) = found
    self.path = path
    self.split = split
    self.root = as_path(root) if root else path.parent / "images"
    everything = read_refs(path)
    self._refs = [r for r in everything if r["split"] == split]
    if not self._refs:
      splits = ", ".join(sorted({str(r["split"]) for r in everything}))
      raise DataError(f"{path} has no split {split!r}; it has {splits}.")
    self._instances = path.parent / "instances.json"
    raw = read_file(self._instances, "put COCO's annotations beside the refs")
    coco = parse_json(raw, str(self._instances), dict)
    pictures = {r["image_id"] for r in self._refs}
    wanted = {i for r in self._refs for i in _as_tuple(r["ann_id"])}
    try:
      self._images = {
        i["id"]: i for i in coco.get("images", ()) if i["id"] in pictures
      }
      self._annotations = {
        a["id"]: a["segmentation"]
        for a in coco.get("annotations", ())
        if a["id"] in wanted
      }
    except (AttributeError, KeyError, TypeError) as error:
      raise DataError(
        f"{self._instances} has a malformed image or annotation ({error})."
      ) from error
    self.fingerprint = digest(path.read_bytes(), raw, split)

  def __len__(self) -> int:
    return len(self._refs)

  def __getitem__(self, index: int) -> Sample:
    ref = self._refs[index]
    where = f"{self.path} ref_id {ref['ref_id']}"
    picture = self._images.get(ref["image_id"])
    if picture is None:
      raise DataError(
        f"{where} names image {ref['image_id']}, which {self._instances} "
        "does not hold."
      )
    try:
      expressions = tuple(s["sent"] for s in ref["sentences"])
      file = below(self.root, picture["file_name"], where)
      size = int(picture["height"]), int(picture["width"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
      raise DataError(f"{where} or its image lacks {error}.") from error
    if not all(isinstance(text, str) for text in expressions):
      raise DataError(f"{where} has a sentence that is no text.")
    targets = tuple(
      self._segmentation(number, where)
      for number in _as_tuple(ref["ann_id"])
      if number != -1
    )
    absent = bool(ref.get("no_target")) or not targets
    if len(targets) > 1:
      targets = (masks.Union(targets),)
    return Sample(
      index=index,
      dataset=self.path.parent.name,
      images=(file,),
      seg_masks=() if absent else targets,
      expressions=expressions,
      kind="absent" if absent else "referring",
      size=size,
      image_keys=(str(file),),
      where=where,
    )

  def _segmentation(self, number: int, where: str) -> Any:
    if number not in self._annotations:
      raise DataError(
        f"{where} names annotation {number}, which {self._instances} does not "
        "hold."
      )
    return self._annotations[number]


def _as_tuple(value: Any) -> tuple:
  return tuple(value) if isinstance(value, (list, tuple)) else (value,)
