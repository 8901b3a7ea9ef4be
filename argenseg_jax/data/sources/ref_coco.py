"""TFDS' own `ref_coco`, prepared beforehand."""

import pathlib

from argenseg_jax.data.sources.parsing import as_text, digest
from argenseg_jax.data.sources.sample import Option, Sample
from argenseg_jax.data.sources.tfds_records import TfdsRecords
from argenseg_jax.runtime.paths import as_path


class TfdsRefCocoSource:
  """Images with several objects; one of them is asked for at each visit.

  Args:
    path: the folder that holds dataset_info.json, such as
      `ref_coco/refcoco_unc/1.1.0`.
    split: its name.
  """

  has_options = True
  has_turns = False
  notes = ()

  def __init__(self, path: str | pathlib.Path, split: str):
    self.path = as_path(path)
    self.split = split
    self._records = TfdsRecords(self.path, split, ("image",))
    self.fingerprint = digest(self._records.info, split)

  @classmethod
  def open(cls, path: str, split: str, root: str | None) -> "TfdsRefCocoSource":
    return cls(path, split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Sample:
    record = self._records[index]
    objects = record["objects"]
    return Sample(
      index=index,
      dataset="ref_coco",
      images=(record["image"],),
      seg_masks=(),
      options=tuple(
        Option(tuple(as_text(text) for text in refexp["raw"]), mask[..., 0])
        for refexp, mask in zip(
          _rows(objects["refexp"]), objects["mask"], strict=True
        )
      ),
      kind="referring",
      image_keys=(int(record["image/id"]),),
      where=f"{self.path} {self.split} record {index}",
    )


def _rows(table) -> list[dict]:
  """A dictionary of lists as a list of dictionaries."""
  if not isinstance(table, dict):
    return list(table)
  return [
    dict(zip(table, row, strict=True))
    for row in zip(*table.values(), strict=True)
  ]
