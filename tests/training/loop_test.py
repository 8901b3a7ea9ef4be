"""The loop: both tasks learn, resume is exact, bad directories are refused."""

import dataclasses
import json
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny_run
from flax import nnx
from tiny_run import losses

from argenseg_jax import checkpoint, config_parsing, sharding
from argenseg_jax.checkpoint import manifest
from argenseg_jax.config import ConfigError, MeshConfig, RunConfig
from argenseg_jax.data import examples
from argenseg_jax.data.text import TextTokenizer
from argenseg_jax.evaluation import records
from argenseg_jax.inference.predictor import Predictor
from argenseg_jax.runtime import preemption, profile
from argenseg_jax.tools import cli
from argenseg_jax.training import code_cache, initialize, loop, step_log


@pytest.fixture(scope="module", autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
  made = tiny_run.both_tasks(tmp_path_factory.mktemp("data"))
  return config_parsing.replace(made, {"mllm.train.profile_steps": (2, 5)})


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
  """Both tasks trained without interruption."""
  path = tmp_path_factory.mktemp("whole")
  loop.run(config, path)
  return path


def variables(path):
  return nnx.to_pure_dict(nnx.state(checkpoint.load(path).model))


def traces(folder) -> dict[str, pathlib.Path]:
  """Sessions of a task, with their files."""
  return {p.parent.name: p for p in folder.rglob("*.xplane.pb")}


def scopes_of(trace: pathlib.Path, program: str) -> set[str]:
  """Parts of the names of a traced program's operations."""
  names = re.findall(
    rb"jit\(%b\)/[ -~]+" % program.encode(), trace.read_bytes()
  )
  return set(re.findall(r"\w+", b" ".join(names).decode()))


def test_a_trace_of_training_reads_like_the_model(workdir):
  (trace,) = traces(workdir / "mllm").values()
  data = jax.profiler.ProfileData.from_file(str(trace))
  events = [
    event
    for plane in data.planes
    for line in plane.lines
    for event in line.events
    if event.name in ("train", "data")
  ]
  steps = [dict(e.stats)["step_num"] for e in events if e.name == "train"]
  assert steps == [2, 3, 4, 5]
  assert len(events) == 8
  parts = {"vision", "decoder", "loss", "optimizer"}
  assert parts <= scopes_of(trace, "step")


def test_resume_is_exact(config, workdir, tmp_path):
  task, init_from = "mllm", str(workdir / "vqvae")
  stopped = tmp_path / task
  original = signal.getsignal(signal.SIGTERM)

  def stop_at_three(self, step, values):
    if step == 2:
      signal.raise_signal(signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_log.MetricsWriter, "write", stop_at_three)
    with pytest.raises(preemption.Interrupted):
      loop.train(config, task, stopped, init_from=init_from)
  assert signal.getsignal(signal.SIGTERM) == original
  assert not (stopped / "results.json").exists()
  loop.train(config, task, stopped, init_from=init_from)
  assert set(traces(stopped)) == {"train_2-5", "train_4-5"}
  whole, resumed = losses(workdir / task), losses(stopped)
  assert resumed
  for step, loss in resumed.items():
    assert loss == whole[step]
  jax.tree.map(
    np.testing.assert_array_equal,
    variables(workdir / task),
    variables(stopped),
  )


def test_restore_on_another_mesh_gives_the_same_losses(
  config, workdir, tmp_path, monkeypatch
):
  # What a checkpoint holds is neither drawn nor read from elsewhere.
  monkeypatch.delattr(sharding, "create_sharded")
  monkeypatch.delattr(initialize, "fill")
  copy = tmp_path / "mllm"
  shutil.copytree(workdir / "mllm", copy)
  shutil.rmtree(copy / "checkpoints" / "6")
  (copy / "results.json").unlink()
  (copy / "metrics.jsonl").unlink()
  other = dataclasses.replace(config, mesh=MeshConfig(2, 2, 1))
  mesh = loop.sharding.make_mesh(other.mesh, jax.devices()[:4])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.sharding, "make_mesh", lambda _: mesh)
    loop.train(other, "mllm", copy, init_from=str(workdir / "vqvae"))
  whole, resumed = losses(workdir / "mllm"), losses(copy)
  assert sorted(resumed) == [4, 5, 6]
  for step, loss in resumed.items():
    assert loss == pytest.approx(whole[step], abs=1e-5)


_CONFIG_FILE = """
import json
from ml_collections import ConfigDict
def get_config():
  return ConfigDict(json.loads({text!r}))
"""


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_run_resumes_with_what_people_change(
  config, workdir, tmp_path, capsys
):
  """Through the command: killed after step 3 of 6, then another mesh, remat,
  accumulation and logging; then more steps at another rate."""
  values = json.dumps(config_parsing.to_dict(config)).replace("null", '""')
  file = tmp_path / "config.py"
  file.write_text(_CONFIG_FILE.format(text=values))
  run = tmp_path / "run"
  shutil.copytree(workdir, run)
  shutil.rmtree(run / "mllm" / "checkpoints" / "6")
  (run / "results.json").unlink()
  (run / "mllm" / "results.json").unlink()

  def train(*changes):
    code = cli.main(["train", f"--config={file}", f"--workdir={run}", *changes])
    return code, capsys.readouterr().err

  free = [
    f"--config.{change}"
    for change in (
      "mesh.data=2",
      "mesh.fsdp=2",
      "mesh.tensor=2",
      "mllm.train.remat=full",
      "mllm.train.accumulate_steps=2",
      "mllm.train.save_every=0",
      "mllm.train.log_every=2",
      "eval.batch_size=8",
    )
  ]
  code, err = train(*free)
  assert code == 0, err
  whole, resumed = losses(workdir / "mllm"), losses(run / "mllm")
  # No step twice, none missing of those that are logged now.
  assert resumed.keys() == whole.keys() - {5}
  for step, loss in resumed.items():
    assert loss == pytest.approx(whole[step], abs=1e-5)

  longer = ["mllm.train.steps=8", "mllm.optimizer.learning_rate=1e-4"]
  longer = [*free, *(f"--config.{change}" for change in longer)]
  code, err = train(*longer)
  assert code == 2
  assert "accept the change with --change_settings" in err
  code, err = train(*longer, "--change_settings")
  assert code == 0, err
  assert max(losses(run / "mllm")) == 8
  assert json.loads((run / "mllm" / "results.json").read_text())["steps"] == 8
  assert (run / "results.json").is_file()
  history = json.loads((run / "config.json").read_text())["history"]
  assert [entry["steps"]["mllm"] for entry in history] == [3, 6]
  assert history[1]["changed"]["mllm.train.steps"] == [6, 8]

  # What a run that gives up advises works in the same directory.
  longer = ["mllm.train.steps=12", "mllm.train.max_skipped=2"]
  longer = [*free, *(f"--config.{change}" for change in longer)]
  rate = "--config.mllm.optimizer.learning_rate"
  code, err = train(*longer, f"{rate}=1e39", "--change_settings")
  assert code == loop.DIVERGED, err
  assert "the update was not finite in 2 steps in a row, the last of" in err
  assert "lower the learning rate (add --change_settings)" in err
  assert max(losses(run / "mllm")) <= 10
  code, err = train(*longer, f"{rate}=1e-4", "--change_settings")
  assert code == 0, err
  curve = losses(run / "mllm")
  assert max(curve) == 12
  assert curve[12] < whole[1]  # From the last good weights.


def test_codes_are_made_without_a_text_tokenizer(
  config, workdir, tmp_path, monkeypatch
):
  """The image tokenizer of a released vocabulary has none."""
  monkeypatch.setattr(
    initialize, "text_tokenizer", lambda *_: pytest.fail("text was read")
  )
  path = tmp_path / "codes.npz"
  tokenize = ("data", "tokenize", f"--checkpoint={workdir / 'vqvae'}")
  assert cli.main([*tokenize, f"--out={path}"]) == 0
  made = checkpoint.load(workdir / "vqvae")
  rows = examples.make_rows(config.data, made.config, TextTokenizer())
  codes = code_cache.read(rows, made.model, path).codes
  assert codes.shape == (48, 1, 17)
  assert len(np.unique(codes)) > 1


def test_loss_falls_and_the_frozen_part_stays(workdir):
  for task in ("vqvae", "mllm"):
    curve = losses(workdir / task)
    assert curve[max(curve)] < curve[1]
  jax.tree.map(
    np.testing.assert_array_equal,
    variables(workdir / "vqvae"),
    variables(workdir / "mllm")["vqvae"],
  )


def test_a_finished_run_is_not_repeated(config, workdir):
  before = (workdir / "mllm" / "metrics.jsonl").read_text()
  loop.run(config, workdir)
  assert (workdir / "mllm" / "metrics.jsonl").read_text() == before


def test_directory_of_another_config_is_refused(config, workdir):
  other = dataclasses.replace(config, seed=1)
  with pytest.raises(ConfigError, match=r"a different config.*seed"):
    loop.run(other, workdir)


def test_an_image_tokenizer_has_no_text_tokenizer(workdir):
  assert (workdir / "mllm" / "tokenizer.json").is_file()
  assert not (workdir / "vqvae" / "tokenizer.json").exists()


def test_image_tokenizer_does_not_predict(workdir):
  loaded = checkpoint.load(workdir / "vqvae")
  with pytest.raises(checkpoint.CheckpointError, match="image tokenizer only"):
    Predictor(loaded)


def test_decoders_load_with_eight_bit_weights(workdir):
  loaded = checkpoint.load(workdir / "mllm", weights="int8")
  assert loaded.model.llm.layers.mlp.up.kernel.dtype == "int8"
  with pytest.raises(checkpoint.CheckpointError, match="are for decoders"):
    checkpoint.load(workdir / "vqvae", weights="int8")


def test_predictions_have_the_size_of_the_picture(workdir, tmp_path):
  predictor = Predictor.from_checkpoint(workdir / "mllm")
  image = np.full((40, 60, 3), 90, np.uint8)
  with profile.traced(tmp_path, "answer"):
    prediction = predictor.segment(image, "the red circle")
  parts = {"vision", "prefill", "text", "scale_1x1", "scale_4x4", "vq_decode"}
  assert parts <= scopes_of(traces(tmp_path)["answer"], "answer")
  assert prediction.seg_mask.shape == (40, 60)
  assert prediction.strip.shape == (2, 64, 64, 3)
  assert prediction.has_mask or not prediction.seg_mask.any()


@pytest.mark.parametrize(
  ("path", "message"),
  [("absent", "does not exist"), (".", "contains no checkpoint")],
)
def test_missing_checkpoint_is_named(path, message, tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match=message):
    checkpoint.load(tmp_path / path)


def test_checkpoint_of_another_variant_names_the_leaf(workdir, tmp_path):
  copy = tmp_path / "copy"
  step = checkpoint.step_directory(workdir / "vqvae")
  shutil.copytree(step, copy)
  meta_path = copy / "meta" / "metadata"
  meta = json.loads(meta_path.read_text())
  meta["model"]["vqvae"]["num_codes"] = 17
  meta_path.write_text(json.dumps(meta))
  manifest.sign(copy)
  with pytest.raises(
    checkpoint.CheckpointError, match=r"cost.*\(2, 16\).*\(2, 17\)"
  ):
    checkpoint.load(copy)


def test_an_interrupted_evaluation_goes_on_to_the_same_results(
  workdir, tmp_path, capsys
):
  command = ["eval", f"--checkpoint={workdir / 'mllm'}", "--split=val"]
  whole, half = tmp_path / "whole", tmp_path / "half"
  assert cli.main([*command, f"--out={whole}"]) == 0
  (half / "val").mkdir(parents=True)
  shutil.copy(whole / "eval.json", half)
  lines = (whole / "val" / "predictions.jsonl").read_text().splitlines(True)
  (half / "val" / "predictions.jsonl").write_text("".join(lines[:5]) + '{"sa')
  assert cli.main([*command, f"--out={half}"]) == 0
  for name in ("results.json", "val/predictions.jsonl"):
    assert (half / name).read_text() == (whole / name).read_text()
  found = json.loads((whole / "results.json").read_text())
  trained = json.loads((workdir / "results.json").read_text())["val"]
  assert found["metrics"]["val"] == trained
  assert len(found["checkpoint"]["sha256"]) == 64
  assert found["data"]["val"]["protocol"] == "per_expression"
  again = records.rescore(whole / "val" / "predictions.jsonl")
  assert again.items() <= trained.items()
  assert cli.main([*command, f"--out={whole}"]) == 2
  assert "results.json exists" in capsys.readouterr().err
  (half / "results.json").unlink()
  assert cli.main([*command, "--max_samples=3", f"--out={half}"]) == 2
  assert "contains another evaluation" in capsys.readouterr().err


def test_a_checkpoint_can_be_inspected(workdir, capsys):
  assert cli.main(["checkpoint", "inspect", str(workdir / "vqvae")]) == 0
  out = capsys.readouterr().out
  assert "quantizer.codebook  float32[16, " in out


def test_results_hold_metrics_with_their_intervals(workdir):
  values = json.loads((workdir / "results.json").read_text())["val"]
  for name in ("ciou", "giou"):
    assert 0 <= values[f"{name}_low"] <= values[name] <= values[f"{name}_high"]
  assert 0 <= values["box_acc@0.5"] <= 1
