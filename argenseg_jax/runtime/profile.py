"""Traces for XProf: what host and devices did, operation by operation.

They lie in FOLDER/plugins/profile/SESSION, where XProf and TensorBoard look;
each session is one entry of their list. Python calls are left out: their events
would fill the trace and slow the host down.
"""

import contextlib
import itertools
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax


class StepTrace:
  """Traces some steps of a loop.

  What goes wrong with a trace is said once, and the loop goes on: it is worth
  more than its trace. A kill loses the trace, and nothing else.

  Args:
    folder: gets the trace.
    steps: the first and the last one, counted from 1; (): none. A loop that
      begins within them traces those that are left.
    name: of a step in the trace.
    process: None, or the number of this process, if several write traces.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    steps: Sequence[int],
    *,
    name: str,
    process: int | None = None,
  ):
    self._folder, self._name, self._process = folder, name, process
    self._first, self._last = steps or (0, 0)
    self._tracing = contextlib.ExitStack()
    self._since = 0  # The first step of the trace that is under way, or 0.

  @contextlib.contextmanager
  def step(self, number: int, before: Any = None) -> Iterator[None]:
    """Step `number` runs within it; a trace waits for the arrays `before`, so
    that it holds no work of earlier steps."""
    if not self._since and self._first <= number <= self._last:
      jax.block_until_ready(before)
      self._begin(number)
    with jax.profiler.StepTraceAnnotation(self._name, step_num=number):
      yield

  def ends_with(self, number: int) -> bool:
    """Whether step `number` is the last one of a trace."""
    return bool(self._since) and number >= self._last

  def write(self, after: Any = None) -> None:
    """Waits for the arrays `after` of the last step, and writes the trace."""
    jax.block_until_ready(after)
    self.close()

  def close(self) -> None:
    """Writes what there is of a trace, if one is under way."""
    self._since = 0
    try:
      self._tracing.close()
    except Exception as error:  # A full disk, for example.
      self._give_up(error)

  def _begin(self, number: int) -> None:
    session = f"{self._name}_{number}-{self._last}"
    try:
      self._tracing.enter_context(
        traced(self._folder, session, process=self._process)
      )
    except Exception as error:  # Something else is being traced.
      self._give_up(error)
    else:
      self._since = number

  def _give_up(self, error: Exception) -> None:
    print(f"no trace is written: {error}", file=sys.stderr, flush=True)
    self._first = self._last = 0


@contextlib.contextmanager
def traced(
  folder: pathlib.Path, session: str, *, process: int | None = None
) -> Iterator[None]:
  """Traces what runs within it.

  Args:
    folder: gets the trace once it is whole.
    session: its name there; a number follows where there is one of that name.
    process: as of `StepTrace`: processes share a session and name their files.

  Raises:
    RuntimeError: something else is being traced.
    OSError: the trace cannot be written.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  target = folder / "plugins" / "profile" / session
  if process is None:
    names = (f"{session}_{i}" for i in itertools.count(2))
    while target.exists():
      target = target.with_name(next(names))
  with tempfile.TemporaryDirectory(prefix="argenseg-trace-") as scratch:
    jax.profiler.start_trace(scratch, profiler_options=options)
    try:
      yield
    finally:
      jax.profiler.stop_trace()
      target.mkdir(parents=True, exist_ok=True)
      prefix = "" if process is None else f"process{process}-"
      for file in pathlib.Path(scratch).glob("plugins/profile/*/*"):
        shutil.move(file, target / f"{prefix}{file.name}")
  print(
    f"wrote a trace; look at run {target.name} with: xprof --logdir={folder}",
    file=sys.stderr,
    flush=True,
  )
