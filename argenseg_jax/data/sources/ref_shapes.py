"""The procedural data set of `data.ref_shapes`."""

import pathlib

from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.parsing import as_text, digest
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.data.sources.tfds_records import TfdsRecords
from argenseg_jax.runtime.paths import as_path


class RefShapesSource:
  """A split of a folder that `ref_shapes.builder.prepare` returned."""

  has_options = False
  has_turns = False
  notes = ()

  def __init__(self, path: str | pathlib.Path, split: str):
    self.path = as_path(path)
    note = self.path / "metadata.json"
    if not ((self.path / "dataset_info.json").is_file() and note.is_file()):
      raise DataError(
        f"{self.path} contains no finished ref_shapes; build it with prepare()."
      )
    self.split = split
    self._records = TfdsRecords(self.path, split, ("image", "seg_mask"))
    self.fingerprint = digest(note.read_bytes(), split)

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "RefShapesSource":
    return cls(path, split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Sample:
    record = self._records[index]
    kind = as_text(record["kind"])
    return Sample(
      index=index,
      dataset="ref_shapes",
      images=(record["image"],),
      seg_masks=() if kind == "absent" else (record["seg_mask"],),
      expressions=tuple(as_text(e) for e in record["expressions"]),
      description=as_text(record["description"]),
      kind=kind,
      image_keys=(int(record["scene_id"]),),
      where=f"{self.path} {self.split} record {index}",
    )
