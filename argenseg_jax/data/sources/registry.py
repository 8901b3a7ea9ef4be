"""From a configuration to a source, or to a mixture of several."""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from argenseg_jax.config import DataConfig
from argenseg_jax.data import chat
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.array_record import (
  ArrayRecordSource,
  require_fitting,
)
from argenseg_jax.data.sources.folder import FolderSource
from argenseg_jax.data.sources.image_folder import (
  ImageFolderSource,
  ImageTargets,
)
from argenseg_jax.data.sources.interactive import Interactive
from argenseg_jax.data.sources.jsonl import JsonlSource, TextToImageSource
from argenseg_jax.data.sources.reason_seg import ReasonSegSource
from argenseg_jax.data.sources.ref_coco import TfdsRefCocoSource
from argenseg_jax.data.sources.ref_shapes import RefShapesSource
from argenseg_jax.data.sources.refer import ReferSource
from argenseg_jax.data.sources.sample import (
  EachRequest,
  Sample,
  Source,
  digest,
  parse_json,
  read_file,
)
from argenseg_jax.data.sources.semantic import Ade20kSource, CocoPanopticSource
from argenseg_jax.runtime.paths import Path, as_path

# Name in `DataConfig.source` -> (path, split, root) -> source.
_SOURCES: dict[str, Callable[[str, str, str | None], Source]] = {
  "ref_shapes": lambda path, split, root: RefShapesSource(path, split),
  "jsonl": lambda path, split, root: JsonlSource(path, root),
  "refer": ReferSource,
  "grefer": lambda *given: ReferSource(*given, pattern="grefs(*).json"),
  "reason_seg": lambda path, split, root: ReasonSegSource(path, split),
  "coco_panoptic": lambda path, split, root: CocoPanopticSource(path, root),
  "ade20k": lambda path, split, root: Ade20kSource(path, split),
  "text_to_image": lambda path, split, root: TextToImageSource(path, root),
  "folder": lambda path, split, root: FolderSource(path),
  "image_folder": lambda path, split, root: ImageFolderSource(path),
  "ref_coco": lambda path, split, root: TfdsRefCocoSource(path, split),
  "array_record": lambda path, split, root: ArrayRecordSource(path, split),
}
_META_KEYS = {
  "annotation",
  "root",
  "repeat_time",
  "length",
  "source",
  "split",
  "request",
  "weight",
  "data_augment",  # InternVL writes it; augmentation is a switch of ours.
}


def open_source(config: DataConfig, *, evaluation: bool = False) -> Source:
  """The source that a configuration names.

  Args:
    config: where it is.
    evaluation: every class or object of a picture, every answer of a
      conversation, and under the per-expression protocol every expression,
      becomes a sample of its own; in training one is drawn at each visit.
      Rows without text and with targets of three channels (an image
      tokenizer's) take the images of the records instead of their masks.

  Raises:
    DataError: it is missing, faulty or empty.
  """
  if config.source == "meta":
    source: Source = _open_meta(as_path(config.path), config.split)
  else:
    source = _SOURCES[config.source](config.path, config.split, config.root)
  if not evaluation:
    for part in _parts(source):
      if isinstance(part, ArrayRecordSource):
        require_fitting(part, config)
  if not config.sequence_length and config.mask_channels == 3:
    return ImageTargets(source)
  # Without text, a mask is one sample however many expressions it has.
  each = config.protocol == "per_expression" and config.sequence_length > 0
  if evaluation and (each or has_options(source) or _has_turns(source)):
    source = EachRequest(source, each_expression=each)
  if not config.interactive:
    return source
  if isinstance(source, Mixture) or has_options(source):
    raise DataError(
      f"config key 'data.interactive' cannot be used with source "
      f"{config.source!r} here: its masks are not fixed before they are drawn."
    )
  return Interactive(source, config.interactive)


def has_options(source: Source) -> bool:
  """Whether its records ask for one of several things at each visit."""
  kinds = (Ade20kSource, CocoPanopticSource, TfdsRefCocoSource)
  return any(
    part.has_options
    if isinstance(part, ArrayRecordSource)
    else isinstance(part, kinds)
    for part in _parts(source)
  )


def _parts(source: Source) -> tuple[Source, ...]:
  return source.parts if isinstance(source, Mixture) else (source,)


def _has_turns(source: Source) -> bool:
  """Whether its records may be conversations of several answers."""
  return any(
    isinstance(p, (JsonlSource, ArrayRecordSource)) for p in _parts(source)
  )


class Mixture:
  """Several sources, one after another.

  Training draws from them by weight, each in an order of its own; evaluation
  goes through all.

  Args:
    parts: the sources.
    weights: how often each is drawn, relative to the others.
    requests: request template of each; empty leaves it to the source.
  """

  def __init__(
    self,
    parts: Sequence[Source],
    weights: Sequence[float],
    requests: Sequence[str],
  ):
    self.parts = tuple(parts)
    self.weights = tuple(map(float, weights))
    self._requests = tuple(requests)
    self.offsets = tuple(itertools.accumulate(map(len, parts), initial=0))
    self.fingerprint = digest(
      *(p.fingerprint for p in parts), repr((self.weights, self._requests))
    )

  def __len__(self) -> int:
    return self.offsets[-1]

  def __getitem__(self, index: int) -> Sample:
    part = bisect.bisect_right(self.offsets, index) - 1
    sample = self.parts[part][index - self.offsets[part]]
    return dataclasses.replace(
      sample,
      index=index,
      request=self._requests[part] or sample.request,
      image_keys=tuple((part, key) for key in sample.image_keys),
    )


def _open_meta(path: Path, split: str) -> Mixture:
  """A mixture from a meta file: {name: {"annotation": path, ...}, ...}."""
  entries = parse_json(read_file(path, "give a meta file"), str(path), dict)
  if not entries:
    raise DataError(f"{path} names no data set.")
  parts, weights, requests = [], [], []
  for name, entry in entries.items():
    where = f"{path} {name!r}"
    part, weight, request = _open_entry(entry, path.parent, split, where)
    parts.append(part)
    weights.append(weight)
    requests.append(request)
  return Mixture(parts, weights, requests)


def _open_entry(
  entry: Any, folder: Path, split: str, where: str
) -> tuple[Source, float, str]:
  if not isinstance(entry, dict) or "annotation" not in entry:
    raise DataError(f'{where} needs "annotation", the path of its records.')
  unknown = sorted(entry.keys() - _META_KEYS)
  if unknown:
    raise DataError(
      f"{where} has an unknown key {unknown[0]!r}; use "
      f"{', '.join(sorted(_META_KEYS))}."
    )
  for key in ("annotation", "root", "source", "split", "request"):
    if not isinstance(entry.get(key), (str, type(None))):
      raise DataError(f"{where} has {key} {entry[key]!r}, which is no text.")
  kind, request = entry.get("source", "jsonl"), entry.get("request", "")
  if kind not in _SOURCES:
    raise DataError(
      f"{where} has source {kind!r}; use one of {', '.join(_SOURCES)}."
    )
  if request and request not in chat.REQUEST_TEMPLATES:
    raise DataError(
      f"{where} has request {request!r}; use one of "
      f"{', '.join(chat.REQUEST_TEMPLATES)}."
    )
  root = entry.get("root")
  source = _SOURCES[kind](
    str(folder / (entry["annotation"] or "")),
    entry.get("split", split),
    None if root is None else str(folder / root),
  )
  length = entry.get("length", len(source))
  if length != len(source):
    raise DataError(
      f"{where} says length {length}, but there are {len(source)} records."
    )
  times = entry.get("repeat_time", 1)
  if not isinstance(times, (int, float)):
    times = 0
  weight = entry.get("weight", times * len(source))
  if not isinstance(weight, (int, float)) or not 0 < weight < 1e15:
    raise DataError(f"{where} needs a weight or repeat_time above 0.")
  return source, weight, request
