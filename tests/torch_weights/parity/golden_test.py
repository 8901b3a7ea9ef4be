"""What the authors' code computed, computed again: see tests/golden."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from argenseg_jax.tools import parity as command
from argenseg_jax.torch_weights.parity import compare, run
from argenseg_jax.torch_weights.parity.compare import Check

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
FOLDERS = (
  "argenseg_small",
  "internlm2_dynamic",
  "internlm2_linear",
  "internvit_rmsnorm",
  "preprocess",
)


@pytest.fixture(autouse=True)
def quick_to_compile():
  """As the command does; other tests want their optimized programs."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_array_agrees(name):
  verdicts, skipped = run.parity(GOLDEN / name)
  assert not skipped
  assert {n: v for n, v in verdicts.items() if not v.ok} == {}
  recorded = compare.Golden.open(GOLDEN / name).recorded
  assert verdicts.keys() == recorded.keys()


def test_command_reports_differences_and_unknown_arrays(tmp_path, capsys):
  folder = tmp_path / "changed"
  shutil.copytree(GOLDEN / "preprocess", folder)
  arrays = dict(np.load(folder / "io.npz"))
  arrays["out.ciou"] = arrays["out.ciou"] + 0.01
  arrays["out.pred_mask0"] = 1 - arrays["out.pred_mask0"]
  arrays["out.nobody_knows"] = np.zeros(3)
  arrays["out.conv0.input_ids"] = arrays["out.conv0.input_ids"][:-1]
  np.savez(folder / "io.npz", **arrays)
  report = tmp_path / "report.json"
  assert command.main([str(folder), "--json", str(report)]) == 1
  values = json.loads(report.read_text())
  assert list(values["not_compared"]) == ["out.nobody_knows"]
  compared = values["compared"]
  wrong = {name for name, entry in compared.items() if not entry["ok"]}
  assert wrong == {"out.ciou", "out.pred_mask0", "out.conv0.input_ids"}
  assert compared["out.ciou"]["max_abs"] == pytest.approx(0.01, rel=1e-3)
  assert compared["out.conv0.input_ids"]["max_abs"] is None
  assert "3 differ, 1 not compared" in capsys.readouterr().out


def _verdict(name, recorded, computed, **kwargs):
  check = Check(lambda: computed, **kwargs)
  return compare.compare(name, np.asarray(recorded), check)


def test_tolerances():
  ones = np.ones(10_000, np.float32)
  off = ones.copy()
  off[0] += 5e-4
  assert not _verdict("out.logits", ones, off).ok
  assert _verdict("out.grad:x", ones, off).ok
  assert not _verdict("out.logits", ones, ones * np.nan).ok
  image = np.full(10_000, 100, np.uint8)
  near = image.copy()
  near[:900] += 1
  assert _verdict("out.image_uint8", image, near).ok
  # As if every second pixel were rounded up.
  assert not _verdict(
    "out.image_uint8", image, np.arange(10_000) % 2 + image
  ).ok
  near[:11] += 1
  assert not _verdict("out.image_uint8", image, near).ok
  codes = np.array([3, 4])
  assert not _verdict("out.idx", codes, codes + 1).ok
  margins = np.array([1e-5, 1.0])
  toss = codes + np.array([1, 0])
  assert _verdict("out.idx", codes, toss, margin=lambda: margins).ok
  assert not _verdict("out.idx", codes, codes + 1, margin=lambda: margins).ok


def test_thinned_arrays_follow_from_whole_ones():
  whole = np.arange(2 * 20 * 6).reshape(2, 20, 6)
  checks = {"out.x": Check(lambda: whole)}
  every = run.thinned("out.x_every8", checks)
  np.testing.assert_array_equal(every.compute(), whole[:, ::8])
  sub = run.thinned("out.x_sub3", checks)
  np.testing.assert_array_equal(sub.compute(), whole[:, ::3, ::3])
  for name in ("out.x_every0", "out.y_sub3", "out.x_third3"):
    assert run.thinned(name, checks) is None


def test_an_exception_is_a_verdict():
  def fails():
    raise ValueError("broken\nin two lines")

  verdict = compare.compare("out.x", np.zeros(2), Check(fails))
  assert not verdict.ok
  assert verdict.error == "ValueError: broken"


@pytest.mark.parametrize("folder", ["nowhere", "empty", "damaged"])
def test_unusable_folders_end_in_one_sentence(tmp_path, capsys, folder):
  from argenseg_jax.tools import cli

  path = tmp_path / folder
  if folder != "nowhere":
    path.mkdir()
  if folder == "damaged":
    (path / "config.json").write_text("{}")
    (path / "io.npz").write_bytes(b"PK no archive")
  assert cli.main(["parity", str(path)]) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1
  assert folder in message
