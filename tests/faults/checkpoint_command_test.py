"""`argenseg checkpoint` tells what is in a work directory, whole or not."""

import json

import jax
import jax.numpy as jnp
import pytest
from faults import damaging
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from argenseg_jax import config_parsing, sharding
from argenseg_jax.checkpoint import Checkpoints, manifest
from argenseg_jax.config import MeshConfig
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.tools import cli
from argenseg_jax.training.initialize import model_config


def _listed(path, capsys):
  """What `ls` says of each step, but for its time."""
  assert cli.main(["checkpoint", "ls", str(path)]) == 0
  head, _, *lines = capsys.readouterr().out.splitlines()
  assert head.endswith("checkpoints:")
  words = [line.split() for line in lines]
  for step, size, *_ in words:
    files = [f for f in (path / "checkpoints" / step).rglob("*") if f.is_file()]
    assert size == f"{sum(f.stat().st_size for f in files) / 2**20:.1f}"
  return {int(w[0]): " ".join(w[4:]) for w in words}


def test_ls_shows_steps_with_loss_scores_and_files(workdir, capsys):
  assert _listed(workdir, capsys) == {1: "whole", 2: "whole"}
  (workdir / "metrics.jsonl").write_text(
    '{"step": 1, "loss": 3.5}\n'
    '{"step": 1, "val/ciou": 0.25, "val/pr@0.5": 1.0}\n'
    '[1]\n{"step": 2, "loss": 2.25}\n{"step": 3, "loss": 9.0}\n{"step": 3, "lo'
  )
  damaging.truncate(workdir / "checkpoints" / "2")
  assert _listed(workdir, capsys) == {
    1: "whole 3.5000 val: ciou 0.250",
    2: "damaged 2.2500",
  }
  # An evaluation after the last step; as the quickstart writes it, too.
  scores = {"testA": {"ciou": 0.5, "giou": 0.75}, "testB": {"ciou": 0.125}}
  (workdir / "results.json").write_text('{"steps": 2}')
  for results in (scores, {"splits": scores, "seed": 0}):
    (workdir.parent / "results.json").write_text(json.dumps(results))
    said = "testA: ciou 0.500 giou 0.750, testB: ciou 0.125"
    assert _listed(workdir, capsys)[2] == f"damaged 2.2500 {said}"


def test_ls_compares_sizes_and_verify_every_byte(workdir, capsys):
  damaging.flip_bit(workdir / "checkpoints" / "2")
  assert _listed(workdir, capsys) == {1: "whole", 2: "whole"}
  assert cli.main(["checkpoint", "verify", str(workdir)]) == 1
  assert "has changed" in capsys.readouterr().out


def test_inspect_shows_the_tree_with_shapes_and_shardings(tmp_path, capsys):
  config = run_config(tiny.get_config(), needs_data=False)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  places = {
    "whole": P(),
    "wide": P(("slice", "data", "fsdp"), "tensor"),
    "long": P(None, "fsdp"),
  }
  values = {
    name: {
      "kernel": jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, spec))
    }
    for name, spec in places.items()
  }
  meta = {
    "task": "mllm",
    "model": config_parsing.to_dict(model_config(config, None)),
  }
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, nnx.State(values), None, meta)
  checkpoints.close()
  assert cli.main(["checkpoint", "inspect", str(tmp_path)]) == 0
  assert capsys.readouterr().out.splitlines() == [
    f"{tmp_path / 'checkpoints' / '3'}: mllm, format 1",
    "  long.kernel  float32[8, 4]  split over fsdp=2",
    "  whole.kernel  float32[8, 4]  whole",
    "  wide.kernel  float32[8, 4]  split over data=2, fsdp=2, tensor=2",
    "96 values",
  ]


def test_diff_tells_how_far_two_steps_are_apart(workdir, capsys):
  one, two = (str(workdir / "checkpoints" / n) for n in "12")
  assert cli.main(["checkpoint", "diff", one, one]) == 0
  assert cli.main(["checkpoint", "diff", one, two]) == 1
  assert "kernel: differs by up to 1\n" in capsys.readouterr().out


def test_diff_names_variables_of_one_side_and_other_shapes(tmp_path, capsys):
  sides = {
    "a": {"same": jnp.ones(2), "shape": jnp.ones(2), "left": jnp.ones(1)},
    "b": {"same": jnp.ones(2), "shape": jnp.ones(3), "right": jnp.ones(1)},
  }
  for name, values in sides.items():
    checkpoints = Checkpoints(tmp_path / name)
    checkpoints.save(1, nnx.State(values), None, {})
    checkpoints.close()
  a, b = (str(tmp_path / name) for name in sides)
  assert cli.main(["checkpoint", "diff", a, b]) == 1
  assert capsys.readouterr().out.splitlines() == [
    f"left: only in {a}",
    f"right: only in {b}",
    "shape: float32(2,) against float32(3,)",
    "3 of 4 variables differ",
  ]


def test_verification_can_be_skipped(workdir, capsys):
  damaging.flip_bit(workdir / "checkpoints" / "2")
  (workdir / "checkpoints" / "1" / "manifest.json").unlink()
  arguments = ["checkpoint", "diff", str(workdir / "checkpoints" / "1")]
  assert cli.main([*arguments, arguments[-1]]) == 2
  assert "--skip_verification" in capsys.readouterr().err
  assert cli.main([*arguments, arguments[-1], "--skip_verification"]) == 0


@pytest.mark.parametrize(
  "line",
  ["[1]", "null", '{"step": "x"}', '{"step": 1e400}', '{"step": true}', "\xff"],
)
def test_odd_metrics_do_not_hide_checkpoints(line, workdir, capsys):
  (workdir / "metrics.jsonl").write_text(f"{line}\n", encoding="latin1")
  (workdir / "results.json").write_text('{"steps": 2}')
  (workdir.parent / "results.json").write_text('{"splits": [1]}')
  assert cli.main(["checkpoint", "ls", str(workdir)]) == 0
  assert capsys.readouterr().out.count("whole") == 2


def test_latest_regular_and_best_steps_are_kept(tmp_path, capsys):
  scores = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.1, 5: None, 6: 0.2, 7: 0.3}
  for _ in range(2):  # A run that goes on knows the scores of before.
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=4, keep_best=1)
    for step, score in scores.items():
      value = damaging.state(float(step))
      checkpoints.save(step, value, (jnp.zeros(2),), {}, score=score)
    checkpoints.wait()
    checkpoints.close()
    scores = {8: float("inf"), 9: 0.4}
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == [2, 4, 8, 9]
  for step in kept:
    assert manifest.faults(tmp_path / "checkpoints" / str(step)) == ()
  listed = _listed(tmp_path, capsys)
  assert listed[2] == "whole score 0.9000"
  assert listed[8] == "whole"
