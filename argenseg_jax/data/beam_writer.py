"""The shards of a build written by many machines, with Apache Beam.

A pipeline is a list of shards to write; every machine must see the sources and
the folder that is built under the same paths. What is written is what a build
on one machine writes.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from argenseg_jax.data.errors import DataError


def run(
  write: Callable[[Any], Any], shards: Sequence[Any], options: str
) -> None:
  """Calls `write` with each shard, somewhere, and waits for all.

  Args:
    write: can be pickled.
    shards: what it takes, plain values.
    options: of the pipeline, as on a command line: "--runner=DirectRunner".

  Raises:
    DataError: Beam is not installed, or an option is not one of its own.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise DataError(
      'a build on Beam needs it: pip install "argenseg_jax[beam]".'
    ) from error
  flags = shlex.split(options)
  made = PipelineOptions(flags)
  known = made.get_all_options()
  for flag in flags:
    name = flag.removeprefix("--").partition("=")[0]
    if flag.startswith("--") and name not in known:
      raise DataError(f"Beam has no pipeline option {flag!r}.")
  with beam.Pipeline(options=made) as pipeline:
    _ = (
      pipeline
      | "shards" >> beam.Create(list(shards))
      | "spread" >> beam.Reshuffle()
      | "write" >> beam.Map(write)
    )
