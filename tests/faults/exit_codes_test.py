"""`argenseg train` and `quickstart` say by their exit codes how a run ended."""

import pytest

from argenseg_jax import checkpoint
from argenseg_jax.runtime import nan_guard, preemption
from argenseg_jax.tools import cli
from argenseg_jax.training import loop, quickstart


@pytest.mark.parametrize(
  ("raised", "code"),
  [
    (None, 0),
    (checkpoint.CheckpointError("this happened."), 2),
    (preemption.Interrupted("this happened."), 3),
    (nan_guard.Diverged("this happened."), 4),
  ],
)
def test_how_a_run_ended(raised, code, tmp_path, monkeypatch, request, capsys):
  runs = []

  def run(config, workdir, *, accept_changed_data, change_settings):
    flags = (accept_changed_data, change_settings)
    runs.append((config.data.path, workdir, flags))
    if raised is not None:
      raise raised

  monkeypatch.setattr(loop, "run", run)
  config = request.config.rootpath / "configs" / "tiny.py"
  arguments = [f"--config={config}", "--config.data.path=x"]
  assert cli.main(["train", *arguments, f"--workdir={tmp_path}"]) == code
  assert runs == [("x", tmp_path, (False, False))]
  said = "argenseg train: this happened.\n" if raised else ""
  assert capsys.readouterr().err == said


@pytest.mark.parametrize(
  ("error", "code"), [(preemption.Interrupted, 3), (nan_guard.Diverged, 4)]
)
def test_how_a_quickstart_ended(error, code, tmp_path, monkeypatch, capsys):
  def run(*_, **__):
    raise error("this happened.")

  monkeypatch.setattr(quickstart, "run", run)
  assert cli.main(["quickstart", f"--workdir={tmp_path}"]) == code
  assert capsys.readouterr().err == "argenseg quickstart: this happened.\n"
