"""Packs any source into ArrayRecord files that TFDS reads, without TensorFlow.

Shards are written independently and in any order; one that is complete is not
written again, so that an interrupted build resumes.
"""

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import pathlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from argenseg_jax.data import beam_writer
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import array_record
from argenseg_jax.data.sources.sample import Source
from argenseg_jax.data.worker_signals import leave_ctrl_c_to_main
from argenseg_jax.runtime import lock, paths
from argenseg_jax.runtime.paths import disk_path

_NAME = "packed"
_PLAN = "plan.json"


class Built(NamedTuple):
  """What a build wrote."""

  records: int
  faults: list[str]  # A sentence for each record that was left out.


def build(
  sources: Mapping[str, Source],
  folder: str | pathlib.Path,
  *,
  records_per_shard: int = 1_000,
  workers: int = 1,
  max_bad_share: float = 0.1,
  resizing: array_record.Resizing | None = None,
  beam: str | None = None,
  on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Built]:
  """Writes `folder` for `ArrayRecordSource`; the work is kept in
  `folder.incomplete` until all is done. What the files
  hold does not depend on `workers`.

  Args:
    sources: one for each split.
    folder: must not exist.
    records_per_shard: records of a file, before bad ones are left out.
    workers: processes.
    max_bad_share: the build stops when more of a split's records are bad.
    resizing: store resized pixels of images, not their own bytes.
    beam: write shards with Apache Beam, with these options of its pipeline.
    on_progress: called with how many records of all splits are done.

  Raises:
    DataError: the folder exists, an interrupted build was of other data, or
      too many records are bad.
  """
  folder = disk_path(folder)
  if folder.exists():
    raise DataError(f"{folder} exists; give another folder or remove it.")
  work = folder.with_name(f"{folder.name}.incomplete")
  with lock.owned(work):  # Two builds would ruin each other's shards.
    return _build(
      sources,
      folder,
      work,
      records_per_shard,
      workers,
      max_bad_share,
      resizing,
      beam,
      on_progress,
    )


def _build(
  sources,
  folder,
  work,
  records_per_shard,
  workers,
  max_bad_share,
  resizing,
  beam,
  on_progress,
) -> dict[str, Built]:
  plan = {split: source.fingerprint for split, source in sources.items()}
  sizes = resizing and resizing._asdict()
  settings = {"records_per_shard": records_per_shard, "resizing": sizes}
  _begin(work, {"sources": plan, **settings})
  jobs = [
    (split, number, first, min(first + records_per_shard, len(source)))
    for split, source in sources.items()
    for number, first in enumerate(range(0, len(source), records_per_shard))
  ]
  if beam is not None:
    _write_with_beam(sources, work, resizing, jobs, beam)
  shards: dict[str, dict[int, dict]] = {split: {} for split in sources}
  done = 0
  ran = _run(sources, (work, resizing), jobs, workers)
  for (split, number, first, stop), shard in ran:
    shards[split][number] = shard
    done += stop - first
    on_progress(done)
    bad = [fault for s in shards[split].values() for fault in s["faults"]]
    if len(bad) > max_bad_share * len(sources[split]):
      raise DataError(
        f"at least {len(bad)} of {len(sources[split])} records of split "
        f"{split!r} are bad, more than the share {max_bad_share}; one of them: "
        f"{bad[0]}"
      )
  ordered = {
    split: [found[number] for number in sorted(found)]
    for split, found in shards.items()
  }
  _finish(work, folder, plan, sizes, ordered)
  return {
    split: Built(
      sum(s["records"] for s in found),
      [fault for s in found for fault in s["faults"]],
    )
    for split, found in ordered.items()
  }


def _begin(work: pathlib.Path, plan: dict[str, Any]) -> None:
  note = work / _PLAN
  found = paths.read_json(note)
  if found is None:  # Nothing, or a plan cut off: whose shards are unknown.
    for left in work.iterdir():
      if left.name != lock.NAME:
        left.unlink()
    _write(note, json.dumps(plan).encode())
  elif found != plan:
    raise DataError(
      f"{work} contains an interrupted build of other data or with another "
      "number of records a shard or size of images; remove it."
    )


def _run(sources, given: tuple, jobs, workers: int):
  """Yields each job with what its shard holds, in the order of completion."""
  if workers <= 1:
    for job in jobs:
      yield job, _write_shard(sources[job[0]], *given, *job)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    workers, context, _set_sources, (dict(sources),)
  ) as pool:
    running = {pool.submit(_work, given, job): job for job in jobs}
    try:
      for future in concurrent.futures.as_completed(running):
        yield running[future], future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise DataError(
        "a process of the build died, perhaps for lack of memory; rerun the "
        "same command, it keeps what is done (--workers=1 needs the least)."
      ) from error
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


_sources: dict[str, Source] = {}  # Of a worker process.


def _set_sources(sources: dict[str, Source]) -> None:
  leave_ctrl_c_to_main()
  _sources.update(sources)


def _work(
  given: tuple[pathlib.Path, array_record.Resizing | None],
  job: tuple[str, int, int, int],
) -> dict[str, Any]:
  return _write_shard(_sources[job[0]], *given, *job)


def _write_with_beam(sources, work, resizing, jobs, options: str) -> None:
  """Writes what is missing, so that the rest of the build finds it."""

  def missing():
    return [job for job in jobs if _written(work, *job[:2]) is None]

  def write(job):
    _write_shard(sources[job[0]], work, resizing, *job)

  beam_writer.run(write, missing(), options)
  if left := missing():
    raise DataError(
      f"Beam's workers left {len(left)} shards of {work} unwritten; all must "
      "see that folder."
    )


def _shard(
  work: pathlib.Path, split: str, number: int
) -> tuple[pathlib.Path, pathlib.Path]:
  """A shard's file, and the note that says that it is complete."""
  path = work / f"{split}-{number:05d}"
  return path, path.with_suffix(".json")


def _written(
  work: pathlib.Path, split: str, number: int
) -> dict[str, Any] | None:
  """What a complete shard holds; None where its file or note is not whole."""
  path, note = _shard(work, split, number)
  found = paths.read_json(note)
  if found is None or not path.is_file():
    return None
  return found if found.get("file_bytes") == path.stat().st_size else None


def _write_shard(
  source: Source,
  work: pathlib.Path,
  resizing: array_record.Resizing | None,
  split: str,
  number: int,
  first: int,
  stop: int,
) -> dict[str, Any]:
  """Writes records first..stop-1, unless they are there; what they are."""
  if (written := _written(work, split, number)) is not None:
    return written
  path, note = _shard(work, split, number)
  from array_record.python.array_record_module import ArrayRecordWriter

  serialize, content = _serializer(), hashlib.sha256()
  records, num_bytes, faults, options = 0, 0, [], False
  # Images are compressed already, or are to be read without any work.
  # Under a name of its own: Beam may let two machines write one shard.
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
  writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
  for index in range(first, stop):
    try:
      sample = source[index]
      record = array_record.encode(sample, resizing)
    except DataError as error:
      faults.append(f"record {index}: {error}")
      continue
    meta, *parts = record.values()
    for part in (meta.encode(), *itertools.chain(*parts)):
      content.update(part)
    encoded = serialize(record)
    writer.write(encoded)
    records, num_bytes = records + 1, num_bytes + len(encoded)
    options = options or bool(sample.options)
  writer.close()
  partial.rename(path)
  shard = {
    "file_bytes": path.stat().st_size,
    "records": records,
    "bytes": num_bytes,
    "faults": faults,
    "options": options,
    # Not of the file: the same records give other bytes each time.
    "digest": content.hexdigest()[:16],
  }
  _write(note, json.dumps(shard).encode())
  return shard


def _features():
  import tensorflow_datasets as tfds  # Slow to import.

  several = tfds.features.Sequence(tfds.features.Text())
  return tfds.features.FeaturesDict(
    {"meta": tfds.features.Text(), "images": several, "seg_masks": several}
  )


def _serializer() -> Callable[[dict[str, Any]], bytes]:
  from tensorflow_datasets.core import example_serializer

  features = _features()
  # TFDS' own annotation knows no nested features.
  specs: Any = features.get_serialized_info()
  made = example_serializer.ExampleSerializer(specs)
  return lambda record: made.serialize_example(features.encode_example(record))


def _finish(work, folder, plan, sizes, shards: dict[str, list[dict]]) -> None:
  """Names the shards as TFDS does, writes its notes and ours."""
  import tensorflow_datasets as tfds

  splits, note = [], {}
  for split, found in shards.items():
    filled = [s for s in found if s["records"]]
    if not filled:
      raise DataError(f"no record of split {split!r} can be read.")
    places = [n for n, s in enumerate(found) if s["records"]]
    for position, number in enumerate(places):
      (work / f"{split}-{number:05d}").rename(
        work / f"{_NAME}-{split}.array_record-{position:05d}"
        f"-of-{len(filled):05d}"
      )
    splits.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[s["records"] for s in filled],
        num_bytes=sum(s["bytes"] for s in filled),
        filename_template=tfds.core.ShardedFileTemplate(
          data_dir=work,
          dataset_name=_NAME,
          split=split,
          filetype_suffix="array_record",
        ),
      )
    )
    note[split] = {
      "source": plan[split],
      "options": any(s["options"] for s in found),
      "resizing": sizes,
      "left_out": sum(len(s["faults"]) for s in found),
      "shards": [s["digest"] for s in filled],
    }
  tfds.folder_dataset.write_metadata(
    data_dir=str(work),
    features=_features(),
    split_infos=splits,
    description="Samples packed by argenseg.",
    check_data=False,  # Would read with TensorFlow.
  )
  _write(work / array_record.NOTE, json.dumps(note, indent=1).encode())
  for split in shards:
    for left in work.glob(f"{split}-*"):
      left.unlink()
  (work / _PLAN).unlink()
  (work / lock.NAME).unlink()  # It is still held, without a name.
  shutil.move(work, folder)


def _write(path: pathlib.Path, content: bytes) -> None:
  """All of it or nothing."""
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
  partial.write_bytes(content)
  partial.rename(path)
