"""`argenseg bench generate` prints each stage and honest ratios."""

import re

import pytest
import tiny_model

from argenseg_jax import config_parsing, variants
from argenseg_jax.tools import cli
from argenseg_jax.tools.bench import generate
from argenseg_jax.tools.bench import stages as bench_stages


def rows_of(printed: str) -> dict[tuple[str, int], float]:
  """(stage, batch) -> seconds."""
  cells = re.findall(r"^\| (\D.*?) \| (\d+) \| ([\d.]+) \|", printed, re.M)
  return {(name, int(batch)): float(seconds) for name, batch, seconds in cells}


@pytest.mark.slow
def test_every_stage_is_timed(monkeypatch, capsys):
  config = config_parsing.replace(tiny_model.config(), {"llm.num_layers": 1})
  monkeypatch.setitem(variants.VARIANTS, "test", config)
  arguments = ["--variant=test", "--batches=1,2", "--repeats=1"]
  assert generate.main(arguments) == 0
  printed = capsys.readouterr().out
  rows = rows_of(printed)
  stages = {"vision tower", "prefill", "text, a word", "VQ decode"}
  stages |= {f"scale {side} x {side}" for side in (1, 2, 4)}
  stages |= {generate.CODES, generate.ONE_BY_ONE}
  stages |= {generate.WHOLE, generate.POST}
  assert {name for name, batch in rows if batch == 1} == stages
  assert {name for name, batch in rows if batch == 2} == {
    *stages,
    generate.SHARED,
  }
  assert printed.count("times as fast as token by token at batch") == 2


def test_what_a_stage_must_cost():
  llm = tiny_model.config().llm
  cost = bench_stages.extension_cost(llm, rows=3, t=5, seen=7, size=2)
  d, hd, heads, kv = 16, 8, 2, 1
  weights = d * (heads + 2 * kv) * hd + heads * hd * d + 3 * d * 24
  scores = 4 * heads * hd * 7
  assert cost.flops == 2 * 3 * 5 * (2 * weights + scores)
  least = 2 * 2 * (weights + 3 * 2 * 7 * kv * hd)
  assert least < cost.bytes < 3 * least  # Operands and results come on top.


def test_chips_without_a_forecast_are_named(capsys):
  assert cli.main(["bench", "generate", "--chips=h100"]) == 2
  assert "--chips=h100: give some of v5e" in capsys.readouterr().err


def test_what_does_not_run_has_no_trace(capsys):
  for name in ("generate", "kernels"):
    with pytest.raises(SystemExit, match="2"):
      cli.main(["bench", name, "--chips=v5e", "--profile=traces"])
    assert "--profile needs programs that run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_peer_draws_a_mask_of_the_same_size():
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from argenseg_jax.tools.bench import peer

  config = config_parsing.replace(
    tiny_model.config(), {"vqvae.width": 32, "vqvae.patch_side": 1}
  )
  side = config.vqvae.scales[-1] * 2
  config = config_parsing.replace(config, {"vqvae.image_side": side})
  # It raises where a drawn mask has not the size of the config's.
  assert len(dict(peer.stages(config, 1))) == 4


def test_bad_batches_are_refused(capsys):
  with pytest.raises(SystemExit, match="2"):
    generate.main(["--batches=0"])
  assert "--batches" in capsys.readouterr().err
