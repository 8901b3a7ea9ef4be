"""Training batches as a config wants them, and the log of bad records."""

import json
import pathlib

import jax
import numpy as np

from argenseg_jax.config import ConfigError, RunConfig
from argenseg_jax.data import examples as rows_lib
from argenseg_jax.data import file_stamps, pipeline
from argenseg_jax.data.curriculum import Curriculum
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.sample import Source
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.runtime import distributed
from argenseg_jax.runtime.paths import (
  Path,
  as_path,
  is_local,
  read_json,
  write_whole,
)
from argenseg_jax.training import code_cache


def open_batches(
  config: RunConfig,
  rows: pipeline.RowMaker,
  vqvae: VQVAE | None,
  workdir: Path,
  *,
  global_batch_size: int,
  logs: pathlib.Path | None = None,
  accept_changed_data: bool = False,
  begins: bool = False,
) -> pipeline.TrainIterator | Curriculum:
  """Training batches of this host.

  Args:
    config: of the run.
    rows: that batches are made of.
    vqvae: of a whole model, whose batches may hold codes instead of masks and
      begin with an easier split; None: neither.
    workdir: gets kept codes.
    global_batch_size: rows of a step over all hosts.
    logs: gets `bad_records.jsonl`; `workdir` by default.
    accept_changed_data: codes of other data are made again, and changed files
      accepted, not refused.
    begins: nothing is resumed, whatever files an earlier call read.

  Raises:
    ConfigError: kept codes of other data, or of one split where two are read.
    DataError: images or masks are others than in the calls before.
  """
  for note in () if jax.process_index() else rows.source.notes:
    print(note, flush=True)
  tail = ""
  if not is_local(workdir) and jax.process_index():
    tail = f"-{jax.process_index()}"  # Each copies its own to the bucket.
  log = (logs or workdir) / f"bad_records{tail}.jsonl"
  noted = set(log.read_text().splitlines()) if log.exists() else set()

  def note_bad(index, why):
    line = json.dumps({"record": index, "why": why})
    if line not in noted:  # By an earlier call of this run.
      print(f"bad record {index}: {why}", flush=True)
      noted.add(line)
      try:
        with log.open("a") as file:
          file.write(line + "\n")
      except OSError as error:  # The log is worth less than the run.
        print(f"{log} is not written: {error}", flush=True)

  def iterate(rows, name):
    if vqvae and rows.config.codes:
      rows = code_cache.read(rows, vqvae, as_path(rows.config.codes))
    elif vqvae and rows.config.cache_codes and not rows.source.has_options:
      path = workdir / f"codes_{name}.npz"
      rows = code_cache.cached(rows, vqvae, path, renew=accept_changed_data)
    elif distributed.is_main():
      path = workdir / f"files_{name}.json"
      _note_files(rows.source, path, renew=accept_changed_data or begins)
    return pipeline.TrainIterator(
      rows,
      global_batch_size,
      host_index=jax.process_index(),
      host_count=jax.process_count(),
      on_bad_record=note_bad,
    )

  main = iterate(rows, "main")
  steps = rows.config.warmup_steps
  if not (vqvae and steps):
    return main
  if rows.config.codes:
    raise ConfigError(
      "config key 'data.codes' contains the codes of one split; set "
      "'data.warmup_steps' to 0."
    )
  easy = rows_lib.of_split(rows, rows.config.warmup_split, evaluation=False)
  return Curriculum(iterate(easy, "warmup"), main, steps)


def _note_files(source: Source, path: Path, *, renew: bool) -> None:
  """Notes what some files of a source contain, or compares with the note."""
  most = file_stamps.SPOT
  note = None if renew else read_json(path)
  try:
    known = file_stamps.Stamps(
      *(
        np.array((note or {})[k], np.uint64) for k in file_stamps.Stamps._fields
      )
    )
  except (KeyError, TypeError, ValueError, OverflowError):
    known = None  # Not there, or damaged: made again.
  if known:
    changed = file_stamps.first_changed(source, known, most=most)
    if changed:
      raise DataError(
        f"{changed} has other images or masks on disk than when this run read "
        "it first; put them back, or accept the change with "
        "--accept_changed_data."
      )
    return
  found = file_stamps.stamps(source, most=most)._asdict()
  text = json.dumps({name: values.tolist() for name, values in found.items()})
  write_whole(path, text)
