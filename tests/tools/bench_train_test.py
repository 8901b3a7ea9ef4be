"""`argenseg bench train` times a whole step, of ours and of the peer."""

import contextlib
import io
import re

import jax
import numpy as np
import pytest
import tiny_model
from flax import nnx

from argenseg_jax import config_parsing, variants
from argenseg_jax.tools import cli
from argenseg_jax.tools.bench import train
from argenseg_jax.types import IGNORE_TARGET


def make_config(**changes):
  return config_parsing.replace(
    tiny_model.config(), {"llm.num_layers": 1, **changes}
  )


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
  return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def ours(traced):
  """The program of a run of the command, and what that run printed."""
  made, compile_ours = [], train.ours

  def keep(*args, **kwargs):
    made.append(compile_ours(*args, **kwargs))
    return made[0]

  printed = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(variants.VARIANTS, "test", make_config())
    patch.setattr(train, "ours", keep)
    with contextlib.redirect_stdout(printed):
      arguments = ["bench", "train", "--variant=test", "--repeats=1"]
      assert cli.main([*arguments, f"--profile={traced}"]) == 0
  return made[0], printed.getvalue()


def test_a_row_has_forty_words_a_picture_and_a_mask():
  config = make_config()
  batch = train.make_batch(config, 2)
  ids = config.token_ids
  assert batch.tokens.shape == (2, 40 + 4 + 21)
  np.testing.assert_array_equal(batch.tokens[:, 5:9], ids.img_context)
  assert np.all(batch.targets[:, -21:] < IGNORE_TARGET)
  bears_loss = batch.targets[0] >= 0
  assert bears_loss.sum() == 20
  following = batch.tokens[0][np.flatnonzero(bears_loss) + 1]
  np.testing.assert_array_equal(batch.targets[0][bears_loss], following)
  assert following[-1] == ids.ge_start


@pytest.mark.slow
def test_only_what_trains_gets_gradients(ours):
  loss, gradients = ours[0].run()
  assert np.isfinite(loss)
  norms = {}
  for path, x in nnx.to_flat_state(gradients):
    part = path[:2] if path[0] == "vision" else path[:1]
    norms.setdefault(".".join(part), []).append(np.abs(x[...]).max())
  assert {"llm", "vision.connector"} <= norms.keys()
  assert not {"vqvae", "vision.tower"} & norms.keys()
  assert all(norm > 0 for norm in norms["llm"])
  assert np.all(np.isfinite(np.concatenate(list(norms.values()))))


@pytest.mark.slow
def test_the_table(ours):
  program, printed = ours
  assert "test, float32, batch 2 of 65 positions" in printed
  row = (
    r"^\| ours, remat none \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|$"
  )
  seconds, rate, temp = map(float, re.search(row, printed, re.M).groups())
  assert rate * (seconds - 0.001) <= 2 * 65 <= rate * (seconds + 0.001)
  assert temp > 0
  assert temp == pytest.approx(program.temp_mib, abs=0.1)
  assert "the peer" not in printed


@pytest.mark.slow
def test_the_step_is_traced(ours, traced):
  (session,) = traced.glob("plugins/profile/*")
  assert session.name == "train_test_batch_2"
  (file,) = session.glob("*.xplane.pb")
  for part in (b"vision", b"vq_encode", b"decoder", b"loss"):
    assert re.search(
      rb"jit\(loss\)/[ -~]*\b" + part + rb"\b", file.read_bytes()
    )


def test_programs_take_turns():
  calls = []
  runs = {name: lambda name=name: calls.append(name) for name in "ab"}
  found = train.in_turns(runs, 2)
  assert "".join(calls) == "ababab"
  assert list(found) == ["a", "b"]


@pytest.mark.slow
def test_the_peer_trains_the_same_parts(ours, monkeypatch, capsys):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from argenseg_jax.tools.bench.peer_training import TrainingPeer

  config = make_config(**{"vqvae.width": 32})
  peer = TrainingPeer(config).eval()
  batch = train.make_batch(config, 2)
  rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(2)]
  losses = [peer.step(row) for row in rows]
  assert abs(losses[0] - losses[1]) > 1e-4
  assert peer.step(batch) == pytest.approx(np.mean(losses), rel=1e-5)
  trains = {n for n, p in peer.named_parameters() if p.grad is not None}
  assert all(p.grad.abs().max() > 0 for p in peer.llm.layers.parameters())
  frozen = ("encoder", "quantizer", "vision.patch", "vision.layers")
  assert not any(name.startswith(frozen) for name in trains)
  assert {"head.weight", "llm.embed_tokens.weight"} <= trains
  assert {"word_embed.weight", "vision.connector.1.weight"} <= trains
  assert peer.encoder(peer.encoder[1].weight.new_zeros(1, 3, 16, 16)).shape == (
    (1, 4, 4, 4)
  )

  monkeypatch.setitem(variants.VARIANTS, "test", config)
  monkeypatch.setattr(train, "ours", lambda *args, **kwargs: ours[0])
  arguments = ["--variant=test", "--repeats=1", "--peer"]
  assert train.main(arguments) == 0
  printed = capsys.readouterr().out
  assert "| peer: PyTorch | " in printed
  assert re.search(
    r"^a training step: [\d.]+ times as fast as the peer \([\d.]+ by CPU",
    printed,
    re.M,
  )


@pytest.mark.parametrize("argument", ["--batch=0", "--repeats=0", "--remat=no"])
def test_bad_arguments_are_refused(argument, capsys):
  with pytest.raises(SystemExit, match="2"):
    train.main([argument])
  assert argument.split("=")[0] in capsys.readouterr().err


def test_a_peer_in_another_dtype_is_refused(capsys):
  arguments = ["bench", "train", "--peer", "--dtype=bfloat16"]
  assert cli.main(arguments) == 2
  assert "--peer computes in float32" in capsys.readouterr().err
