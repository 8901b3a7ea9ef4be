"""`argenseg bench generate` prints each stage and honest ratios."""

import re

import pytest
import tiny_model

from argenseg_jax import config as config_lib
from argenseg_jax.models import variants
from argenseg_jax.tools import bench_generate


def rows_of(printed: str) -> dict[tuple[str, int], float]:
  """(stage, batch) -> seconds."""
  cells = re.findall(r"^\| (\D.*?) \| (\d+) \| ([\d.]+) \|", printed, re.M)
  return {(name, int(batch)): float(seconds) for name, batch, seconds in cells}


def test_every_stage_is_timed(monkeypatch, capsys):
  monkeypatch.setitem(variants.VARIANTS, "test", tiny_model.config())
  arguments = ["--variant=test", "--batches=1,2", "--repeats=1"]
  assert bench_generate.main(arguments) == 0
  printed = capsys.readouterr().out
  rows = rows_of(printed)
  stages = {"vision tower", "prefill", "VQ decode", bench_generate.CODES}
  stages |= {bench_generate.ONE_BY_ONE, bench_generate.WHOLE}
  assert {name for name, batch in rows if batch == 1} == stages
  assert {name for name, batch in rows if batch == 2} == {
    *stages,
    bench_generate.SHARED,
  }
  assert printed.count("times as fast as token by token at batch") == 2


def test_the_peer_draws_a_mask_of_the_same_size():
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from argenseg_jax.tools import bench_peer

  config = config_lib.replace(
    tiny_model.config(), {"vqvae.width": 32, "vqvae.patch_side": 1}
  )
  side = config.vqvae.scales[-1] * 2
  config = config_lib.replace(config, {"vqvae.image_side": side})
  # It raises where a drawn mask has not the size of the config's.
  assert len(dict(bench_peer.stages(config, 1))) == 4


def test_bad_batches_are_refused(capsys):
  with pytest.raises(SystemExit, match="2"):
    bench_generate.main(["--batches=0"])
  assert "--batches" in capsys.readouterr().err
