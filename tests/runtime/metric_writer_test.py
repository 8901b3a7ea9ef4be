"""Metrics go to the trackers that a config names, and nowhere else; progress
tells how fast, and how long yet."""

import sys
import types

import pytest

from argenseg_jax.config import ConfigError, TrackingConfig
from argenseg_jax.runtime import metric_writer
from argenseg_jax.runtime.tracker import Tracked


@pytest.fixture
def wandb(monkeypatch):
  """Stands for the package; `calls` holds what it was asked to do."""
  calls = []

  def init(**options):
    calls.append(("init", options))
    return types.SimpleNamespace(
      define_metric=lambda *a, **k: None,
      log=lambda values: calls.append(("log", values)),
      finish=lambda: calls.append(("finish", {})),
    )

  made = types.ModuleType("wandb")
  vars(made).update(init=init, Settings=dict, calls=calls)
  monkeypatch.setitem(sys.modules, "wandb", made)
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
  return made


def write(folder, **tracking):
  settings = TrackingConfig(**tracking)
  writer = metric_writer.MetricsWriter(
    Tracked(folder, 2, settings, "run/mllm", {"seed": 7})
  )
  writer.write(3, {"loss": 0.5, "mfu": 0.4})
  writer.close()


def test_weights_and_biases_gets_them_offline(wandb, tmp_path):
  write(tmp_path, trackers=("wandb",))
  (_, options), *rest = wandb.calls
  assert options["mode"] == "offline"
  assert options["group"] == "run/mllm"
  assert options["config"] == {"seed": 7}
  assert options["dir"] == str(tmp_path)
  logged = ("log", {"step": 3, "loss": 0.5, "mfu": 0.4})
  assert rest == [logged, ("finish", {})]
  assert not (tmp_path / "tensorboard").exists()


def test_nothing_is_sent_that_no_config_asked_for(wandb, tmp_path):
  write(tmp_path)
  assert wandb.calls == []
  assert (tmp_path / "tensorboard").is_dir()
  write(tmp_path, trackers=("wandb",), wandb_mode="online")
  assert wandb.calls[0][1]["mode"] == "online"


def test_training_outlives_a_tracker(wandb, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
  write(tmp_path, trackers=("wandb", "tensorboard"))
  assert "Weights & Biases gets no metrics: division" in capsys.readouterr().err
  assert '"mfu": 0.4' in (tmp_path / "metrics.jsonl").read_text()
  assert (tmp_path / "tensorboard").is_dir()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  metric_writer.require_trackers(TrackingConfig())
  with pytest.raises(ConfigError, match="not installed: pip install wandb"):
    metric_writer.require_trackers(TrackingConfig(trackers=("wandb",)))


def test_progress_counts_from_its_first_update(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(metric_writer.time, "monotonic", lambda: now[0])
  bar = metric_writer.Progress("train", 100, start=40)
  for seconds, done, note in (
    (90.0, 50, "loss 2.000"),  # Compilation.
    (5.0, 55, "too early"),
    (5.0, 60, "loss 1.000, val ciou 0.500"),
    (200.0, 61, "slow"),
    (1.0, 100, ""),
    (9.0, 100, "again"),
  ):
    now[0] += seconds
    bar.update(done, note)
  assert capsys.readouterr().out.splitlines() == [
    "train 50/100 loss 2.000",
    "train 60/100 loss 1.000, val ciou 0.500, 1.0/s, 40 s left",
    "train 61/100 slow, 19.1 s each, 12 min left",
    "train 100/100 took 5 min",
  ]
  assert metric_writer.duration(2 * 3600 + 5 * 60) == "2 h 05 min"
