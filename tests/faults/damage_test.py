"""A damaged checkpoint never loads; the newest good one does."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from faults import damaging
from flax import nnx

from argenseg_jax import checkpoint, config_parsing, variants
from argenseg_jax.checkpoint import CheckpointError, Checkpoints, manifest
from argenseg_jax.config import ConfigError
from argenseg_jax.data import text
from argenseg_jax.runtime import compilation_cache, paths
from argenseg_jax.tools import cli

DAMAGE = {
  "flipped bit": (damaging.flip_bit, "has changed"),
  "truncated": (damaging.truncate, "bytes, not"),
  "missing file": (lambda s: damaging.largest(s).unlink(), "is missing"),
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
    state, _, meta = checkpoints.restore(
      step, damaging.state(0.0), (jnp.zeros(2),)
    )
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
  damaging.flip_bit(checkpoints / "2")
  assert checkpoint.step_directory(workdir) == checkpoints / "1"
  assert "looking for an older one" in capsys.readouterr().err
  with pytest.raises(CheckpointError, match=r"2 is damaged: .*has changed"):
    checkpoint.step_directory(checkpoints / "2")
  with manifest.unverified():
    assert checkpoint.step_directory(workdir) == checkpoints / "2"


def test_nothing_is_moved_when_every_step_is_damaged(workdir):
  for step in (1, 2):
    damaging.flip_bit(workdir / "checkpoints" / str(step))
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
  damaging.truncate(workdir / "checkpoints" / "1")
  assert cli.main(["checkpoint", "verify", str(workdir)]) == 1
  out = capsys.readouterr().out
  assert f"{workdir / 'checkpoints' / '1'}: damaged" in out
  assert f"{workdir / 'checkpoints' / '2'}: good" in out
  assert "bytes, not" in out


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
