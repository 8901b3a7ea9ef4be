"""Every layout of the real photographs goes from its files to a score."""

import json

import jax
import pytest

from argenseg_jax.tools import cli

SMALL = (
  '("vision.width=16","llm.width=16","llm.num_layers=1","llm.head_dim=8",'
  '"llm.mlp_width=16","vqvae.width=8","vqvae.scales=(1,4)",'
  '"vqvae.patch_side=8","vqvae.num_codes=16","llm.vocab_size=%d")'
)


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


def _run(*argv):
  assert cli.main([str(a) for a in argv]) == 0


@pytest.mark.long
def test_check_build_tokenize_show_train_eval(request, tmp_path, capsys):
  root = request.config.rootpath
  real = root.parent / "shared" / "real" / "coco33"
  if not real.is_dir():
    pytest.skip("the photographs are not here")
  paths = {"refer": real, "grefer": real, "jsonl": real / "coco33.jsonl"}
  sources = [f"{layout}={path}" for layout, path in paths.items()]
  _run("data", "check", *sources)
  mixture = {}
  for source in sources:
    layout = source.split("=")[0]
    out = tmp_path / layout
    _run("data", "build", source, f"--out={out}", "--workers=1")
    mixture[layout] = {"annotation": layout, "source": "array_record"}
  meta = tmp_path / "meta.json"
  meta.write_text(json.dumps(mixture))
  from argenseg_jax.data.text import TextTokenizer

  vocabulary = TextTokenizer().token_ids.first_code + 16
  config = [
    f"--config={root / 'configs' / 'own_masks.py'}",
    f"--config.model.overrides={SMALL % vocabulary}",
    "--config.data.source=meta",
    f"--config.data.path={meta}",
    "--config.data.cache_codes=False",
    "--config.tokenizer_training.entropy_weight=0.0",
    "--config.tokenizer_training.warm_start_steps=0",
    "--config.tokenizer_training.kmeans_iterations=0",
    "--config.mllm.train.eval_every=0",
    "--config.eval.max_samples=8",
  ]
  for task in ("vqvae", "mllm"):
    config += [
      f"--config.{task}.train.steps=2",
      f"--config.{task}.train.global_batch_size=8",
    ]
  first, codes = tmp_path / "first", tmp_path / "codes.npz"
  tasks = "--config.tasks=('%s',)"
  _run("train", *config, tasks % "vqvae", f"--workdir={first}")
  checkpoint = f"--checkpoint={first / 'vqvae'}"
  _run("data", "tokenize", f"meta={meta}", checkpoint, f"--out={codes}")
  sheet = tmp_path / "sheet.png"
  _run("data", "show", f"meta={meta}", checkpoint, f"--out={sheet}")
  assert sheet.stat().st_size > 50_000
  config += [
    f"--config.init_from={first / 'vqvae'}",
    f"--config.data.codes={codes}",
  ]
  second = tmp_path / "second"
  _run("train", *config, tasks % "mllm", f"--workdir={second}")
  score = tmp_path / "score"
  capsys.readouterr()
  _run(
    *("eval", f"--checkpoint={second / 'mllm'}", "--data", *sources),
    *("--max_samples=8", f"--out={score}"),
  )
  results = json.loads((score / "results.json").read_text())
  assert str(results).count("'ciou'") == len(sources)
