"""Traces of some steps of a loop, and nothing else, whatever goes wrong."""

import jax
import pytest

from argenseg_jax.runtime import profile


def run(folder, *, steps=(2, 3), begin=1, end=5, **options):
  """The sessions that a loop of these steps leaves."""
  trace = profile.StepTrace(folder, steps, name="step", **options)
  try:
    for number in range(begin, end + 1):
      with trace.step(number):
        pass
      if trace.ends_with(number):
        trace.write()
  finally:
    trace.close()
  return sorted(p.name for p in folder.glob("plugins/profile/*"))


def numbers(path) -> list[int]:
  """Steps that a trace holds."""
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  events = [e for p in planes for line in p.lines for e in line.events]
  return [dict(e.stats)["step_num"] for e in events if e.name == "step"]


@pytest.mark.parametrize(
  ("options", "sessions", "traced"),
  [
    ({}, ["step_2-3"], [2, 3]),
    ({"steps": ()}, [], []),
    ({"begin": 3}, ["step_3-3"], [3]),
    ({"begin": 4}, [], []),  # Resumed behind them.
    ({"end": 2}, ["step_2-3"], [2]),  # Ended within them.
  ],
)
def test_these_steps_are_traced(options, sessions, traced, tmp_path):
  assert run(tmp_path, **options) == sessions
  files = [*tmp_path.rglob("*.xplane.pb")]
  assert [n for file in files for n in numbers(file)] == traced


def test_no_trace_replaces_another(tmp_path):
  run(tmp_path)
  assert run(tmp_path) == ["step_2-3", "step_2-3_2"]


def test_processes_share_a_session(tmp_path):
  for process in range(2):
    run(tmp_path, process=process)
  (session,) = tmp_path.glob("plugins/profile/*")
  found = {file.name.split("-")[0] for file in session.glob("*.xplane.pb")}
  assert found == {"process0", "process1"}


def test_a_loop_outlives_its_trace(tmp_path, capsys):
  (tmp_path / "plugins").write_text("no folder")
  assert run(tmp_path) == []
  assert "no trace is written: " in capsys.readouterr().err
  (tmp_path / "plugins").unlink()
  with jax.profiler.trace(tmp_path / "other"):
    assert run(tmp_path) == []
  err = capsys.readouterr().err
  assert err.count("no trace is written: ") == 1
  assert "already been started" in err
