"""From a configuration to a source, or to a mixture of several."""

import bisect
import dataclasses
import difflib
import importlib
import itertools
from collections.abc import Sequence
from typing import Any

from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data import chat
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import array_record
from argenseg_jax.data.sources.image_folder import ImageTargets
from argenseg_jax.data.sources.interactive import Interactive
from argenseg_jax.data.sources.parsing import (
  digest,
  is_finite,
  nearest,
  parse_json,
  read_file,
)
from argenseg_jax.data.sources.sample import EachRequest, Sample, Source
from argenseg_jax.runtime.paths import Path, as_path

MIXTURE = "meta"
# Name in `DataConfig.source` -> a class of this package, `MODULE.CLASS`. It is
# a `Source`, and `CLASS.open(path, split, root)` opens it.
LAYOUTS = {
  "ref_shapes": "ref_shapes.RefShapesSource",
  "jsonl": "jsonl.JsonlSource",
  "refer": "refer.ReferSource",
  "grefer": "refer.GrefSource",
  "reason_seg": "reason_seg.ReasonSegSource",
  "coco_panoptic": "semantic.CocoPanopticSource",
  "ade20k": "semantic.Ade20kSource",
  "text_to_image": "jsonl.TextToImageSource",
  "folder": "folder.FolderSource",
  "image_folder": "image_folder.ImageFolderSource",
  "ref_coco": "ref_coco.TfdsRefCocoSource",
  "refcoco_m": "refcoco_m.RefcocoMSource",
  "array_record": "array_record.ArrayRecordSource",
}
NAMES = (*LAYOUTS, MIXTURE)
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


def require_known(name: str) -> None:
  """Raises ConfigError for what `DataConfig.source` cannot be."""
  if name not in NAMES:
    close = difflib.get_close_matches(name, NAMES, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
      f"config key 'data.source' is {name!r}; use {', '.join(NAMES)}{hint}"
    )


def open_layout(name: str, path: str, split: str, root: str | None) -> Source:
  """A source by the name of its layout, see `LAYOUTS`."""
  module, _, kind = LAYOUTS[name].partition(".")
  package = f"{__package__}.{module}"
  source = getattr(importlib.import_module(package), kind)
  return source.open(path, split, root)


def open_source(config: DataConfig, *, evaluation: bool = False) -> Source:
  """The source that a configuration names.

  Args:
    config: where it is.
    evaluation: every class or object of an image, every answer of a
      conversation, and under the per-expression protocol every expression,
      becomes a sample of its own; in training one is drawn at each visit.
      Rows without text and with targets of three channels (an image
      tokenizer's) take the images of the records instead of their masks.

  Raises:
    ConfigError: no layout has this name.
    DataError: it is missing, faulty or empty.
  """
  require_known(config.source)
  if config.source == MIXTURE:
    source: Source = _open_meta(as_path(config.path), config.split)
  else:
    source = open_layout(config.source, config.path, config.split, config.root)
  if not evaluation:
    for part in source.parts if isinstance(source, Mixture) else (source,):
      if isinstance(part, array_record.ArrayRecordSource):
        array_record.require_fitting(part, config)
  if not config.sequence_length and config.mask_channels == 3:
    return ImageTargets(source)
  # Without text, a mask is one sample however many expressions it has.
  each = config.protocol == "per_expression" and config.sequence_length > 0
  split_up = each or source.has_options or source.has_turns
  if evaluation and split_up:
    source = EachRequest(source, each_expression=each)
  if not config.interactive:
    return source
  if isinstance(source, Mixture) or source.has_options:
    raise DataError(
      f"config key 'data.interactive' cannot be used with source "
      f"{config.source!r} here: its masks are not fixed before they are drawn."
    )
  return Interactive(source, config.interactive)


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
    self.has_options = any(part.has_options for part in parts)
    self.has_turns = any(part.has_turns for part in parts)
    self.notes = tuple(note for part in parts for note in part.notes)

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
  raw = read_file(path, "give a meta file")
  entries = parse_json(raw, str(path), dict, strict=True)
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
  entry = {key: value for key, value in entry.items() if value is not None}
  unknown = sorted(entry.keys() - _META_KEYS)
  if unknown:
    near = nearest(unknown[0], _META_KEYS)
    hint = f"did you mean {near!r}? It may have " if near else "use "
    raise DataError(
      f"{where} has an unknown key {unknown[0]!r}; {hint}"
      f"{', '.join(sorted(_META_KEYS))}."
    )
  for key in ("annotation", "root", "source", "split", "request"):
    if not isinstance(entry.get(key, ""), str):
      raise DataError(f"{where} has {key} {entry[key]!r}, which is no text.")
  kind, request = entry.get("source", "jsonl"), entry.get("request", "")
  if kind not in LAYOUTS:
    raise DataError(
      f"{where} has source {kind!r}; use one of {', '.join(LAYOUTS)}."
    )
  if request and request not in chat.REQUEST_TEMPLATES:
    raise DataError(
      f"{where} has request {request!r}; use one of "
      f"{', '.join(chat.REQUEST_TEMPLATES)}."
    )
  root = entry.get("root")
  source = open_layout(
    kind,
    str(folder / entry["annotation"]),
    entry.get("split", split),
    None if root is None else str(folder / root),
  )
  length = entry.get("length", len(source))
  if length != len(source):
    raise DataError(
      f"{where} says length {length}, but there are {len(source)} records."
    )
  times = entry.get("repeat_time", 1)
  times = times if is_finite(times) else 0
  weight = entry.get("weight", times * len(source))
  if not (is_finite(weight) and 0 < weight < 1e15):
    raise DataError(f"{where} needs a weight or repeat_time above 0.")
  return source, weight, request
