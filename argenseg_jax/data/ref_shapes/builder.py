"""TFDS builder of `ref_shapes`, and `prepare`, which builds it once.

Runs without TensorFlow: images are encoded bytes, the schema is flat, and the
records are ArrayRecord files that any TFDS reader opens.
"""

import contextlib
import pathlib
import shutil
import sys
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from argenseg_jax.data import signatures
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.ref_shapes import requests
from argenseg_jax.runtime import paths

# TFDS moves this file into place together with the records.
PARAMETERS = "metadata.json"


OnProgress = Callable[[int, int], None]


def parameters(
  num_train: int, num_eval: int, seed: int, image_side: int
) -> dict[str, int]:
  """What decides every byte of the records."""
  return {
    "num_train": num_train,
    "num_eval": num_eval,
    "seed": seed,
    "image_side": image_side,
  }


class RefShapes(tfds.core.GeneratorBasedBuilder):
  """Colored shapes with referring expressions and their masks.

  Keyword arguments: `num_train` and `num_eval` requests in train and in each
  of the other splits, `seed`, `image_side` in pixels, and `workers` processes
  to draw in. The records do not depend on `workers`.
  """

  VERSION = tfds.core.Version("1.3.0")
  name = "ref_shapes"

  def __init__(
    self,
    *,
    num_train: int = 24_000,
    num_eval: int = 1_000,
    seed: int = 0,
    image_side: int = 128,
    workers: int = 1,
    on_progress: OnProgress | None = None,
    **kwargs,
  ):
    self._parameters = parameters(num_train, num_eval, seed, image_side)
    self._counts = {
      split: {"train": num_train, "single": num_train // 6}.get(split, num_eval)
      for split in requests.SPLITS
    }
    self._seed = seed
    self._image_side = image_side
    self._workers = workers
    self._on_progress = on_progress
    self._done = 0
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    side = self._image_side
    return tfds.core.DatasetInfo(
      builder=self,
      description="Procedural scenes of colored shapes with requests.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(side, side, 3), encoding_format="jpeg"
          ),
          "seg_mask": tfds.features.Image(
            shape=(side, side, 1), encoding_format="png"
          ),
          "expressions": tfds.features.Sequence(tfds.features.Text()),
          "description": tfds.features.Text(),
          "kind": tfds.features.Text(),
          "scene_id": tfds.features.Scalar(np.int64),
          "num_objects": tfds.features.Scalar(np.int64),
        }
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(self._parameters),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Everything is drawn here.
    return {
      split: self._generate_examples(split, count)
      for split, count in self._counts.items()
    }

  def _generate_examples(self, split: str, count: int):
    records = requests.iterate_requests(
      split,
      count,
      seed=self._seed,
      image_side=self._image_side,
      workers=self._workers,
    )
    for item in enumerate(records):
      yield item
      self._done += 1
      if self._on_progress is not None:
        self._on_progress(self._done, sum(self._counts.values()))


def folder(data_dir: str | pathlib.Path) -> pathlib.Path:
  """Where `prepare` puts the data set below `data_dir`."""
  return pathlib.Path(data_dir) / RefShapes.name / str(RefShapes.VERSION)


def prepare(
  data_dir: str | pathlib.Path,
  *,
  num_train: int = 24_000,
  num_eval: int = 1_000,
  seed: int = 0,
  image_side: int = 128,
  workers: int = 1,
  on_progress: OnProgress | None = None,
) -> pathlib.Path:
  """Builds ref_shapes below `data_dir`, or finds it built already.

  Args:
    data_dir: created when absent.
    num_train: requests of the train split; "single" gets a sixth of them.
    num_eval: requests of each of val, testA and testB.
    seed: the same seed gives the same bytes.
    image_side: side of the images in pixels.
    workers: processes that draw.
    on_progress: called after each record with how many of how many exist.

  Returns:
    The folder of the prepared data set, for `RefShapesSource`.

  Raises:
    DataError: the folder holds a data set with other parameters, or a file of
      it has changed.
  """
  wanted = parameters(num_train, num_eval, seed, image_side)
  target = folder(data_dir)
  if target.exists():
    found = paths.read_json(target / PARAMETERS)
    if found == wanted:
      signatures.require_unchanged(target)
      return target
    other = sorted(k for k in wanted if (found or {}).get(k) != wanted[k])
    raise DataError(
      f"{target} contains ref_shapes with another {', '.join(other)}, or it is "
      "damaged; use another folder or remove it."
    )
  # TFDS builds in "incomplete.XXXXXX_VERSION" and gives it its name at the end.
  for left_over in target.parent.glob(f"incomplete.*_{target.name}"):
    shutil.rmtree(left_over)
  shown = sys.stdout  # TFDS talks of a download; only progress may be seen.

  def report(done: int, total: int) -> None:
    if on_progress is not None:
      with contextlib.redirect_stdout(shown):
        on_progress(done, total)

  builder = RefShapes(
    data_dir=str(data_dir),
    num_train=num_train,
    num_eval=num_eval,
    seed=seed,
    image_side=image_side,
    workers=workers,
    on_progress=report,
  )
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(None):
    builder.download_and_prepare()
  signatures.sign(target)
  return target
