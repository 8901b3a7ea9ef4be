"""Evaluation: each sample once, on any devices and hosts; several turns, masks
and sorts of questions in one data set."""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tiny_rows
import tiny_run
from data import layouts
from flax import nnx

from argenseg_jax import checkpoint, sharding
from argenseg_jax.config import DataConfig, MeshConfig
from argenseg_jax.config_parsing import run_config, to_dict
from argenseg_jax.configs import base
from argenseg_jax.data import examples, text
from argenseg_jax.evaluation import evaluator, records
from argenseg_jax.kernels import dispatch
from argenseg_jax.tools import cli
from argenseg_jax.tools import eval as eval_tool

TOTAL = 13


@pytest.fixture(scope="module", autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A random model's checkpoint, and 13 samples of 12 records."""
  folder = tmp_path_factory.mktemp("run")
  made = layouts.jsonl_records(folder)
  more = [
    {"image": "a.jpg", "question": "red?", "label": "yes"},
    {"image": "b.jpg", "text": "hue?", "answers": ["red"] * 4 + ["blue"] * 6},
    {"image": "a.jpg", "question": "?", "choices": ["x", "y"], "answer": "B"},
    {"image": "b.jpg", "kind": "absent"}
    | {"conversations": layouts.chat("<image>\na cat", "no")},
  ]
  rest = [made[0], made[1] | {"image": "a.jpg"}, made[0] | {"image": "b.jpg"}]
  path = layouts.write_lines(folder / "data.jsonl", made + more + rest)
  c = base.get_config()
  c.data.path = str(path)
  c.data.request = "free"
  c.data.sequence_length = 240
  c.data.image_side = c.data.mask_side = 16
  c.data.mask_intermediate_side = 0
  c.data.max_masks = 2
  c.data.threads = 1
  c.eval.batch_size = 4
  c.eval.max_text = 4
  config = run_config(c)
  model = tiny_rows.model()
  workdir = folder / "mllm"
  saved = checkpoint.Checkpoints(workdir)
  meta = {
    "task": "mllm",
    "model": to_dict(model.config),
    "run": to_dict(config),
    "data": {},
  }
  saved.save(1, nnx.state(model), None, meta)
  saved.wait()
  saved.close()
  shutil.copy(text.SHIPPED, workdir / "tokenizer.json")
  return config, workdir


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
  """Evaluated on all eight devices by the command, with a report."""
  out = tmp_path_factory.mktemp("out") / "whole"
  own, partitioned = dispatch._own, set()

  def choose(*kernel):
    partitioned.add(dispatch.partitioned())
    return own(*kernel)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dispatch, "_own", choose)
    assert cli.main(_command(run, out, "--report")) == 0
  # XLA splits these programs, which it cannot do to a kernel.
  assert partitioned == {True}
  return out


def _command(run, out, *more):
  return ["eval", f"--checkpoint={run[1]}", f"--out={out}", *more]


def _records(out):
  lines = (out / "train" / records.FILE).read_text().splitlines()
  return [json.loads(line) for line in lines]


def _metrics(out):
  return json.loads((out / "results.json").read_text())["metrics"]["train"]


def _same(found, wanted):
  """Equal numbers; sums over teacher-forced codes up to rounding."""
  assert found == pytest.approx(wanted, abs=1e-5)
  for name in ("ciou", "giou", "invalid", "samples", "text_exact"):
    assert found[name] == wanted[name]


def test_every_answer_is_one_sample_and_every_mask_is_scored(run, whole):
  found = _records(whole)
  asked = [(r["sample"], r["turn"], r.get("number")) for r in found]
  assert len(asked) == len(set(asked))
  assert {r["sample"] for r in found} == set(range(TOTAL))
  assert sum("mask" in r for r in found) == _metrics(whole)["samples"] == 10
  assert _metrics(whole)["questions"] == 5
  turns = [r for r in found if r["question"] == "and the right one?"]
  assert [r["turn"] for r in turns] == [1]
  right = records.pixels(turns[0]["truth"])
  np.testing.assert_array_equal(right, layouts.RIGHT)


def test_results_say_what_was_measured(run, whole):
  found = json.loads((whole / "results.json").read_text())
  assert found["data"]["train"]["protocol"] == "merged"
  assert len(found["checkpoint"]["sha256"]) == 64
  assert {"jax", "argenseg_jax"} <= found["versions"].keys()
  metrics = found["metrics"]["train"]
  names = ("token_acc", "token_acc@1x1", "token_acc@4x4", "grounding_gap")
  assert {*names, "vqa_soft", "choice_accuracy", "yes_share"} <= metrics.keys()
  rescored = records.rescore(whole / "train" / records.FILE)
  assert rescored.items() <= metrics.items()


def test_the_report_shows_masks_and_words(whole):
  page = (whole / "report.html").read_text()
  for part in ("train: best", "train: answers in words", "no mask", "red?"):
    assert part in page
  assert "http" not in page
  assert page.count("<figure>") == 2  # One a picture.


@pytest.mark.slow
def test_one_device_gives_the_same_numbers(run, whole, monkeypatch):
  # As on a GPU: the layers are taken apart before the program begins.
  monkeypatch.setattr(dispatch, "copies_slices", lambda: True)
  config, workdir = run
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  loaded = checkpoint.load(workdir, mesh=mesh)
  made = examples.make_rows(
    config.data, loaded.config, checkpoint.text_tokenizer(loaded)
  )
  graph, state = nnx.split(loaded.model)
  found = evaluator.Evaluator(graph, config.eval)(
    state, examples.of_split(made, "train")
  )
  _same(found.metrics, _metrics(whole))
  assert found.records == _records(whole)


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(run, whole, tmp_path):
  address = tiny_run.free_address()
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "argenseg_jax.tools.cli"),
        *_command(run, tmp_path / "two", f"--coordinator={address}"),
        "--num_processes=2",
        f"--process_id={i}",
      ],
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  for process in processes:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
  _same(_metrics(tmp_path / "two"), _metrics(whole))
  assert _records(tmp_path / "two") == _records(whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(run, whole, tmp_path):
  half = tmp_path / "half"
  (half / "train").mkdir(parents=True)
  shutil.copy(whole / "eval.json", half)
  lines = (whole / "train" / records.FILE).read_text().splitlines(True)
  cut = "".join(lines[:11]) + lines[11][:40]
  (half / "train" / records.FILE).write_text(cut)
  assert cli.main(_command(run, half)) == 0
  assert _metrics(half) == _metrics(whole)
  assert _records(half) == _records(whole)


def test_changed_data_are_not_mixed_with_older_answers(
  run, whole, tmp_path, capsys
):
  half = tmp_path / "half"
  shutil.copytree(whole, half)
  (half / "results.json").unlink()
  claim = json.loads((half / "eval.json").read_text())
  assert len(claim["fingerprints"]["train"]) == 33
  claim["fingerprints"]["train"] = "of other data"
  (half / "eval.json").write_text(json.dumps(claim))
  before = _records(half)
  assert cli.main(_command(run, half)) == 2
  assert "data that has changed since (train)" in capsys.readouterr().err
  assert _records(half) == before


def test_outputs_and_limits_are_checked_first(run, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  for out, more, message in (
    (tmp_path / "file", (), "is a file; give a folder"),
    (tmp_path / "file/out", (), "is a file; give a folder"),
    (tmp_path / "out", ("--max_samples=-1",), "--max_samples is -1"),
  ):
    assert cli.main(_command(("", "no checkpoint"), out, *more)) == 2
    assert message in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_results_name_the_rules_of_words(whole):
  found = json.loads((whole / "results.json").read_text())
  assert found["rules"]["pope_accuracy"].startswith("POPE")
  assert found["rules"].keys() <= found["metrics"]["train"].keys()


def test_tokenizer_is_measured_by_prefix(run, tmp_path, capsys):
  out = tmp_path / "out"
  assert cli.main(_command(run, out, "--what=tokenizer")) == 0
  found = _metrics(out)
  assert found["samples"] == 9
  assert [p["side"] for p in found["prefixes"]] == [1, 2, 4]
  last = found["prefixes"][-1]
  assert last["ciou"] == found["ciou"]
  assert "boundary_f" in capsys.readouterr().out
  assert 1 <= found["perplexity"] <= found["codes_used"] <= 11


@pytest.mark.slow
def test_settings_are_changed_on_the_command_line(run, tmp_path, capsys):
  out = tmp_path / "out"
  more = (
    *("--config.eval.max_text=2", "--max_samples=1", "--protocol=merged"),
    *("--config.mesh.data=4", "--config.mesh.fsdp=2", "--dtype=bfloat16"),
  )
  assert cli.main(_command(run, out, *more)) == 0
  found = json.loads((out / "results.json").read_text())
  assert found["eval"]["max_text"] == 2
  for flag, message in (
    ("--config.model.variant=x", "changes nothing here"),
    ("--config.eval.max_txt=2", "max_txt"),
    ("--what=nothing", None),
    ("--watt=1", "unknown argument '--watt=1'"),
  ):
    if message is None:
      continue
    assert cli.main(_command(run, tmp_path / "no", flag)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ("splits", "asked", "measured"),
  [
    (("val", "testA"), "", ["val", "testA"]),
    (("val", "testA"), "testB", ["testB"]),
    ((), "", ["train"]),
  ],
)
def test_the_configs_splits_are_measured_unless_one_is_named(
  splits, asked, measured
):
  args = argparse.Namespace(protocol="", data=[], split=asked)
  own = DataConfig(source="ref_shapes", path="data", split="train")
  found = eval_tool._data_sets(own, splits, args)
  assert list(found) == measured
  assert [data.split for data in found.values()] == measured


def test_splits_that_ask_for_images_are_left_out(tmp_path, monkeypatch, capsys):
  """A run on texts and images ended in an error after its last step."""
  rows = tiny_rows.write("text_to_image", tmp_path, mask_channels=3)
  assert examples.asks_for_images(rows)
  values = base.get_config()
  values.data.path = "unused"
  values.eval.splits = ("train",)
  config = dataclasses.replace(run_config(values), data=rows.config)
  model = tiny_rows.model()
  loaded = types.SimpleNamespace(model=model, config=model.config)
  monkeypatch.setattr(
    checkpoint, "text_tokenizer", lambda _: rows.text_tokenizer
  )
  measured = evaluator.evaluate_checkpoint(config, loaded, pytest.fail)
  assert measured == {}
  assert "train asks for images, which no metric" in capsys.readouterr().out
