"""Several samples in one row, without attention from one to another."""

import numpy as np

from argenseg_jax.data.example_builder import Row, RowMaker
from argenseg_jax.types import IGNORE_TARGET, Batch

_TEXT = {"tokens": 0, "targets": IGNORE_TARGET, "positions": 0}
_TEXT |= {"segment_ids": 0, "is_prompt": False}  # What padding holds.


class Packer:
  """Turns `data.pack` indices into one row with a segment for each record.

  The row has `pack` times the places for images and masks, the used ones
  first. Where the samples do not fit into `sequence_length` together, the
  longest one is cut, at most to an equal share of it; then the next. A bad
  record, such as one that cannot be cut so far, gets no segment; a row without
  any has no weight.

  Args:
    rows: makes the rows of single records.
  """

  def __init__(self, rows: RowMaker):
    self._rows = rows

  def __call__(self, indices: np.ndarray, rng: np.random.Generator) -> Row:
    """The row of some records; `rng` draws as in `RowMaker`."""
    length = self._rows.config.sequence_length
    seeds = rng.integers(1 << 62, size=len(indices))
    made = [
      self._rows(int(index), np.random.default_rng(seed))
      for index, seed in zip(indices, seeds, strict=True)
    ]
    sizes = [int(np.count_nonzero(row.fields.segment_ids)) for row in made]
    while (excess := sum(sizes) - length) > 0:
      i = int(np.argmax(sizes))
      fitting = max(sizes[i] - excess, length // len(sizes))
      again = np.random.default_rng(seeds[i])
      made[i] = self._rows(int(indices[i]), again, length=fitting)
      sizes[i] = int(np.count_nonzero(made[i].fields.segment_ids))
    return Row(
      self._join([row.fields for row in made]),
      bad=tuple(bad for row in made for bad in row.bad),
      cut=tuple(cut for row in made for cut in row.cut),
    )

  def _join(self, rows: list[Batch]) -> Batch:
    good = [row for row in rows if row.sample_weight > 0]
    used = [np.count_nonzero(row.segment_ids) for row in good]
    joined = {}
    for name, padding in _TEXT.items():
      parts = [
        getattr(row, name)[:size] for row, size in zip(good, used, strict=True)
      ]
      joined[name] = _filled(getattr(rows[0], name), parts, padding)
    joined["segment_ids"][: sum(used)] = np.repeat(
      np.arange(len(used)) + 1, used
    )
    img_start = self._rows.tokenizer.token_ids.img_start
    images = [
      row.images[: np.count_nonzero(row.tokens == img_start)] for row in good
    ]
    joined["images"] = _filled(_places(rows, "images"), images, 0)
    for name in ("seg_masks", "codes", "mask_valid"):
      parts = [getattr(row, name)[row.mask_valid] for row in good]
      joined[name] = _filled(_places(rows, name), parts, 0)
    weight = np.array(bool(good), np.float32)
    return Batch(**joined, sample_weight=weight, sample_id=rows[0].sample_id)


def _places(rows: list[Batch], name: str) -> np.ndarray:
  return np.concatenate([getattr(row, name) for row in rows])


def _filled(like: np.ndarray, parts: list[np.ndarray], padding) -> np.ndarray:
  """The parts one after another in an array like the given one."""
  filled = np.full_like(like, padding)
  if parts:
    content = np.concatenate(parts)
    filled[: len(content)] = content
  return filled
