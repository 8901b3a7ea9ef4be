"""What a person who watches a run is shown of its validations."""

import io
import types

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import base
from argenseg_jax.data.sources.sample import Sample
from argenseg_jax.evaluation import records
from argenseg_jax.evaluation.evaluator import SplitResults
from argenseg_jax.runtime.goodput import Goodput
from argenseg_jax.training.step_log import StepLog


@pytest.fixture
def log(tmp_path):
  config = base.get_config()
  config.data.path = "unused"
  config.mllm.train.steps = 40
  return StepLog(
    "train mllm",
    run_config(config).mllm.train,
    tmp_path,
    workdir=tmp_path / "seen",
    writer=types.SimpleNamespace(write=lambda step, values: None),
    pace=types.SimpleNamespace(pause=lambda: None),
    goodput=Goodput(),
    start=0,
    active=True,
  )


def _results() -> SplitResults:
  """Of two requests for one image."""
  encoded = io.BytesIO()
  Image.new("RGB", (8, 8), "gray").save(encoded, "PNG")
  truth = np.zeros((8, 8), bool)
  truth[:4] = True
  samples = [
    Sample(
      i,
      "toy",
      (encoded.getvalue(),),
      (truth,),
      ("the top",),
      image_keys=("a",),
    )
    for i in range(2)
  ]
  made = [
    records.records(i, sample, [truth], [truth], text="")[0] | {"iou": 1.0}
    for i, sample in enumerate(samples)
  ]
  rows = types.SimpleNamespace(source=samples)
  return SplitResults({"ciou": 0.5, "samples": 2}, made, rows)


def test_a_validation_is_said_drawn_and_kept_in_sight(log, tmp_path, capsys):
  log.evaluated(10, "val", _results())
  drawn = tmp_path / "validation.png"
  assert drawn.stat().st_size > 1000
  log.finish(40)
  said = capsys.readouterr().out.splitlines()
  assert said[-2] == (
    "train mllm, step 10: val ciou 0.500; its masks: "
    f"{tmp_path / 'seen' / 'validation.png'}"
  )
  assert said[-1].startswith("train mllm 40/40 val ciou 0.500, took ")


def test_training_outlives_what_cannot_be_drawn(log, tmp_path, capsys):
  (tmp_path / "validation.png").mkdir()
  log.evaluated(10, "val", _results())
  seen = capsys.readouterr()
  assert seen.out.splitlines()[-1] == "train mllm, step 10: val ciou 0.500"
  assert "validation.png is not written: " in seen.err
