"""A damaged checkpoint never loads; the newest good one does."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from argenseg_jax import checkpoint, config_parsing, sharding, variants
from argenseg_jax.checkpoint import CheckpointError, Checkpoints, manifest
from argenseg_jax.config import ConfigError, MeshConfig
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.data import text
from argenseg_jax.runtime import compilation_cache, paths
from argenseg_jax.tools import cli
from argenseg_jax.training.initialize import model_config


def _state(value):
  return nnx.State({"kernel": nnx.Param(jnp.full((64, 3), value))})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A work directory with steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(workdir, keep=3)
  for step in (1, 2):
    value = _state(float(step))
    checkpoints.save(step, value, (jnp.zeros(2),), {"step": step})
  checkpoints.wait()
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"


def _largest(step):
  files = [p for p in (step / "model").rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def _flip_bit(step):
  path = _largest(step)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def _truncate(step):
  path = _largest(step)
  path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
  "flipped bit": (_flip_bit, "has changed"),
  "truncated": (_truncate, "bytes, not"),
  "missing file": (lambda s: _largest(s).unlink(), "is missing"),
  "missing item": (lambda s: shutil.rmtree(s / "model"), "is missing"),
  "no manifest": (lambda s: (s / "manifest.json").unlink(), "is missing"),
  "odd manifest": (
    lambda s: (s / "manifest.json").write_text("[1]"),
    "is unreadable",
  ),
  "odd notes": (
    lambda s: (s / "_CHECKPOINT_METADATA").write_bytes(b"\xff{"),
    "is unreadable",
  ),
  "file added": (lambda s: (s / "x").write_text("x"), "x is not in"),
}


def _restore(workdir):
  checkpoints = Checkpoints(workdir, keep=3)
  try:
    step = checkpoints.newest_good()
    state, _, meta = checkpoints.restore(step, _state(0.0), (jnp.zeros(2),))
    checkpoints.save(3, state, (jnp.zeros(2),), {"step": 3})
    checkpoints.wait()
  finally:
    checkpoints.close()
  return step, float(state["kernel"][...][0, 0]), meta["step"]


def test_undamaged_steps_have_no_faults(saved):
  for step in (1, 2):
    assert manifest.faults(saved / "checkpoints" / str(step)) == ()


def test_every_file_of_a_step_is_signed(saved):
  step = saved / "checkpoints" / "2"
  signed = json.loads((step / "manifest.json").read_text())["files"]
  files = {str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()}
  at_commit = {"_CHECKPOINT_METADATA", "commit_success.txt"}
  assert signed.keys() == files - {"manifest.json"} - at_commit


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_goes_back_to_the_newest_good_step(kind, workdir, capsys):
  damage, said = DAMAGE[kind]
  damage(workdir / "checkpoints" / "2")
  assert _restore(workdir) == (1, 1.0, 1)
  err = capsys.readouterr().err
  assert f"{workdir / 'checkpoints' / '2'} is damaged" in err
  assert said in err, err
  # Put aside, not deleted: the step can be saved again.
  assert (workdir / "damaged_checkpoints" / "2").is_dir()
  assert not (workdir / "checkpoints" / "2").exists()
  assert manifest.faults(workdir / "checkpoints" / "3") == ()


def test_readers_pass_over_a_damaged_step(workdir, capsys):
  checkpoints = workdir / "checkpoints"
  _flip_bit(checkpoints / "2")
  assert checkpoint.step_directory(workdir) == checkpoints / "1"
  assert "looking for an older one" in capsys.readouterr().err
  with pytest.raises(CheckpointError, match=r"2 is damaged: .*has changed"):
    checkpoint.step_directory(checkpoints / "2")
  with manifest.unverified():
    assert checkpoint.step_directory(workdir) == checkpoints / "2"


def test_nothing_is_moved_when_every_step_is_damaged(workdir):
  for step in (1, 2):
    _flip_bit(workdir / "checkpoints" / str(step))
  with pytest.raises(
    CheckpointError, match=r"every checkpoint in .* is damaged"
  ):
    _restore(workdir)
  assert (workdir / "checkpoints" / "2").is_dir()
  with pytest.raises(
    CheckpointError, match=r"every checkpoint in .* is damaged"
  ):
    checkpoint.step_directory(workdir)


def test_half_written_step_is_none(workdir):
  checkpoints = workdir / "checkpoints"
  (checkpoints / "2").rename(checkpoints / "2.orbax-checkpoint-tmp")
  (checkpoints / "2.orbax-checkpoint-tmp" / "manifest.json").unlink()
  assert _restore(workdir) == (1, 1.0, 1)


def test_another_dtype_is_named(workdir):
  checkpoints = Checkpoints(workdir, keep=3)
  wanted = nnx.State({"kernel": nnx.Param(jnp.ones((64, 3), jnp.bfloat16))})
  with pytest.raises(CheckpointError, match=r"kernel as float32.*bfloat16"):
    checkpoints.restore(2, wanted, (jnp.zeros(2),))
  checkpoints.close()


def test_verify_names_every_damaged_file(tmp_path, capsys):
  workdir = tmp_path / "run"
  _whole_model(workdir)
  assert cli.main(["checkpoint", "verify", str(workdir)]) == 0
  _truncate(workdir / "checkpoints" / "1")
  assert cli.main(["checkpoint", "verify", str(workdir)]) == 1
  out = capsys.readouterr().out
  assert f"{workdir / 'checkpoints' / '1'}: damaged" in out
  assert f"{workdir / 'checkpoints' / '2'}: good" in out
  assert "bytes, not" in out


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
  _truncate(workdir / "checkpoints" / "2")
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
  _flip_bit(workdir / "checkpoints" / "2")
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
  _flip_bit(workdir / "checkpoints" / "2")
  (workdir / "checkpoints" / "1" / "manifest.json").unlink()
  arguments = ["checkpoint", "diff", str(workdir / "checkpoints" / "1")]
  assert cli.main([*arguments, arguments[-1]]) == 2
  assert "--skip_verification" in capsys.readouterr().err
  assert cli.main([*arguments, arguments[-1], "--skip_verification"]) == 0


def test_another_format_is_refused_before_anything_is_restored(workdir):
  step = workdir / "checkpoints" / "2"
  path = step / "meta" / "metadata"
  meta = json.loads(path.read_text()) | {"format": 99}
  path.write_text(json.dumps(meta))
  manifest.sign(step)
  with pytest.raises(
    CheckpointError, match=r"2 has format 99, this version reads 1"
  ):
    _restore(workdir)


def test_another_shape_or_leaf_is_named(workdir):
  checkpoints = Checkpoints(workdir, keep=3)
  for wanted, said in (
    ({"kernel": jnp.ones((64, 4))}, r"kernel of shape \(64, 3\).*\(64, 4\)"),
    ({"other": jnp.ones((64, 3))}, r"kernel, which this model has not"),
    ({"kernel": jnp.ones((64, 3)), "x": jnp.ones(1)}, r"lacks x;"),
  ):
    state = nnx.State({name: nnx.Param(x) for name, x in wanted.items()})
    with pytest.raises(CheckpointError, match=said):
      checkpoints.restore(2, state, (jnp.zeros(2),))
  checkpoints.close()


def test_latest_regular_and_best_steps_are_kept(tmp_path, capsys):
  scores = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.1, 5: None, 6: 0.2, 7: 0.3}
  for _ in range(2):  # A run that goes on knows the scores of before.
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=4, keep_best=1)
    for step, score in scores.items():
      value = _state(float(step))
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


def _whole_model(workdir):
  """A saved image tokenizer that its meta data describe, and its files."""
  config = variants.get("tiny", {"vqvae.width": 8, "vqvae.num_codes": 16})
  make = checkpoint.model_factory("vqvae", config)
  workdir.mkdir()
  shutil.copy(text.SHIPPED, workdir / "tokenizer.json")
  (workdir / checkpoint.KEPT).mkdir()
  (workdir / checkpoint.KEPT / "config.json").write_text("{}")
  checkpoints = Checkpoints(workdir, keep=2)
  meta = {"task": "vqvae", "model": config_parsing.to_dict(config)}
  for step in (1, 2):
    checkpoints.save(step, nnx.state(make()), None, meta)
  checkpoints.close()
  return checkpoint.step_directory(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "a[1]b", "run [x]*?"])
def test_what_a_model_needs_is_verified(name, tmp_path, capsys):
  """In folders that globs take for patterns, too: there Orbax lost arrays."""
  step = _whole_model(tmp_path / name)
  assert cli.main(["checkpoint", "verify", str(tmp_path / name)]) == 0
  assert checkpoint.load(tmp_path / name).task == "vqvae"
  if name != "run":
    return
  for file in ("tokenizer.json", f"{checkpoint.KEPT}/config.json"):
    original = (tmp_path / name / file).read_bytes()
    (tmp_path / name / file).write_bytes(original + b" ")
    capsys.readouterr()
    assert cli.main(["checkpoint", "verify", str(tmp_path / name)]) == 1
    assert f"{file} beside it has changed" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=f"{file} beside it has changed"):
      checkpoint.require_unchanged(step)
    with manifest.unverified():
      checkpoint.require_unchanged(step)
    (tmp_path / name / file).write_bytes(original)
  shutil.copytree(step, tmp_path / "alone" / "1")  # Nothing is beside it.
  assert cli.main(["checkpoint", "verify", str(tmp_path / "alone")]) == 0


def test_a_good_step_is_good_by_a_relative_path(tmp_path, monkeypatch):
  """Which Orbax does not follow: every step was called damaged."""
  _whole_model(tmp_path / "run")
  monkeypatch.chdir(tmp_path)
  assert cli.main(["checkpoint", "verify", "run"]) == 0


def test_a_signed_step_that_cannot_be_restored_is_damaged(tmp_path, capsys):
  step = _whole_model(tmp_path / "run")
  for metadata in (step / "model").glob("_METADATA"):
    metadata.unlink()
  manifest.sign(step)  # The hashes are right.
  assert manifest.faults(step) == ()
  assert cli.main(["checkpoint", "verify", str(step)]) == 1
  assert "cannot be restored: files of its 'model'" in capsys.readouterr().out
  with pytest.raises(CheckpointError, match="cannot be restored"):
    checkpoint.load(step)


def test_checkpoints_below_a_backslash_are_refused(tmp_path):
  with pytest.raises(CheckpointError, match="without backslashes"):
    Checkpoints(tmp_path / "a\\b")
  assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_found_or_named(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert paths.as_path("~/run") == tmp_path / "run"
  assert paths.disk_path("~") == tmp_path
  assert paths.as_path("~run").name == "~run"

  def no_home(self):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(type(tmp_path), "expanduser", no_home)
  with pytest.raises(ConfigError, match="this process has no home folder"):
    paths.as_path("~/run")
  monkeypatch.setattr(type(tmp_path), "home", lambda: no_home(None))
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.delenv(compilation_cache.SWITCH, raising=False)
  if not jax.config.jax_compilation_cache_dir:
    assert compilation_cache.enable() is None


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
