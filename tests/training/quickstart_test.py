"""What a quickstart finds in its work directory: its own, or a sentence."""

import json
import pathlib
import signal

import pytest

from argenseg_jax.config import ConfigError
from argenseg_jax.config_parsing import run_config
from argenseg_jax.runtime import preemption
from argenseg_jax.tools import cli
from argenseg_jax.tools.quickstart import scaled_config
from argenseg_jax.training import quickstart


def _run(workdir, *, seed=0, scale=1.0):
  config = scaled_config(seed, scale)
  config.data.path = str(workdir / "data")
  return quickstart.run(run_config(config), workdir, num_train=256, num_eval=32)


@pytest.fixture
def trains(monkeypatch):
  """Stages leave what they leave, without the work."""
  calls = []

  def stages(config, workdir, *_):
    calls.append(config.seed)
    for task in config.tasks:
      (workdir / task / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)
    results = {"seed": config.seed}
    (workdir / "results.json").write_text(json.dumps(results))
    return results

  monkeypatch.setattr(quickstart, "_run", stages)
  return calls


def test_a_finished_one_is_not_repeated_nor_passed_for_another(
  trains, tmp_path
):
  assert _run(tmp_path) == _run(tmp_path) == {"seed": 0}
  assert trains == [0]
  with pytest.raises(ConfigError, match=r"data\.seed, seed\)") as raised:
    _run(tmp_path, seed=1)
  assert "--accept" not in str(raised.value)  # It has no such flag.
  with pytest.raises(ConfigError, match=r"mllm\.train\.steps"):
    _run(tmp_path, scale=0.5)
  (tmp_path / "results.json").write_text("")  # Cut off by a kill.
  assert _run(tmp_path) == {"seed": 0}
  assert trains == [0, 0]


@pytest.mark.parametrize("name", ["report.html", "results.json", "lock.json"])
def test_a_folder_of_something_else_is_refused(name, trains, tmp_path):
  (tmp_path / name).write_text("<p>mine</p>")
  with pytest.raises(ConfigError, match="of something else; give a work dir"):
    _run(tmp_path)
  assert (tmp_path / name).read_text() == "<p>mine</p>"
  assert trains == []


def _stages(path, **remaining):
  return quickstart._Stages(path, remaining)


def test_seconds_that_a_kill_cut_off_are_counted_anew(tmp_path):
  path = tmp_path / "seconds.json"
  for left in ("", "[1]", '{"data": "x"}', '{"data": 1'):
    path.write_text(left)
    stage = _stages(path, data=1)
    with stage("data", "drawing"):
      pass
    assert set(stage.seconds()) == {"data"}


def test_each_stage_says_how_long_it_will_take_here(
  tmp_path, monkeypatch, capsys
):
  now = [0.0]
  monkeypatch.setattr(quickstart.time, "monotonic", lambda: now[0])
  stage = _stages(tmp_path / "seconds.json", data=0, vqvae=320, mllm=1000)
  with stage("data", "drawing"):
    pass
  with stage("vqvae", "training"):  # 100 s on quiet cores.
    now[0] += 300
  with stage("mllm", "training"):  # 215 s.
    pass
  assert capsys.readouterr().out.splitlines() == [
    "about 5 min on two quiet cores; interrupted, the same command resumes",
    "[1/3] drawing, done already",
    "[2/3] training, about 2 min on two quiet cores",
    "[3/3] training, about 11 min at the speed of this machine so far",
  ]


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 3), (signal.SIGINT, 130)]
)
def test_it_stops_while_it_draws(number, code, tmp_path, monkeypatch, capsys):
  def prepare(*_, on_progress, **__):
    signal.raise_signal(number)
    on_progress(1, 2)
    raise AssertionError("it went on")

  monkeypatch.setattr(quickstart.builder, "prepare", prepare)
  assert cli.main(["quickstart", f"--workdir={tmp_path}"]) == code
  (line,) = capsys.readouterr().err.splitlines()
  assert "stopped on request" in line
  assert not pathlib.Path(tmp_path, "results.json").exists()
  assert preemption.Interrupted("").code == preemption.INTERRUPTED
