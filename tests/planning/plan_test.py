"""`argenseg plan`: real compilations of a small model, and its sentences."""

import importlib.util
import json

import jax
import pytest
from tiny_run import OVERRIDES, VOCAB

from argenseg_jax.config import ConfigError
from argenseg_jax.planning import plan, topology
from argenseg_jax.tools import cli
from argenseg_jax.tools import plan as plan_tool


@pytest.fixture
def arguments(request):
  """A model of a few thousand parameters, split over eight devices."""
  overrides = (*OVERRIDES, f"llm.vocab_size={VOCAB}", "llm.num_layers=6")
  config = request.config.rootpath / "configs" / "tiny.py"
  return [
    f"--config={config}",
    f"--config.model.overrides={overrides!r}",
    "--config.tasks=('mllm',)",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--config.mllm.train.remat=full",
    # Muon multiplies whole matrices: AdamW alone shows what gradients cost.
    "--config.mllm.optimizer.name=adamw",
    "--config.eval.batch_size=8",
    "--config.eval.max_text=2",
  ]


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


def run(capsys, *argv) -> tuple[int, str, str]:
  code = cli.main(["plan", *argv])
  out = capsys.readouterr()
  return code, out.out, out.err


def test_training_on_eight_cpu_devices(arguments, capsys):
  average = "--config.mllm.optimizer.ema_decay=0.9"
  code, out, _ = run(capsys, "--topology=cpu:8", "--json", *arguments, average)
  assert code == 0
  (report,) = json.loads(out)
  assert report["fits"]
  assert report["whole_gradients_all_reduced"] == []
  # A head, an embedding, three tables; and seven kernels in each of 6 layers.
  assert report["collectives"]["reduce-scatter"]["runs"] >= 6 * 7 + 2
  sizes = report["bytes"]
  # Two moments in float32 and a counter or two.
  assert 0 < sizes["moments"] - 2 * sizes["parameters"] < 64
  assert sizes["average"] == sizes["parameters"]
  assert report["peak"] >= sizes["moments"] + 2 * sizes["parameters"]
  assert report["model_flops"] > report["recomputed_flops"] > 0
  assert "mfu" not in report  # Nobody publishes the rates of a CPU.
  text = plan_tool.describe(report)
  assert "fsdp 8" in text
  assert "all-reduced: none" in text


def test_generation_on_eight_cpu_devices(arguments, capsys):
  code, out, _ = run(capsys, "--topology=cpu:8", "--what=generate", *arguments)
  assert code == 0
  assert "generate of tiny on cpu:8 (fsdp 8)" in out
  assert "all-gather" in out


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_training_on_a_described_tpu(arguments, capsys):
  # XLA for TPUs reduces smaller matrices whole, and means to.
  wide = ("llm.width=128", "llm.head_dim=64", "llm.mlp_width=128")
  overrides = (*OVERRIDES, f"llm.vocab_size={VOCAB}", "llm.num_layers=6", *wide)
  code, out, _ = run(
    capsys,
    "--topology=v5e:2x4",
    "--json",
    *arguments,
    f"--config.model.overrides={overrides!r}",
  )
  assert code == 0
  (report,) = json.loads(out)
  assert report["whole_gradients_all_reduced"] == []
  assert report["collectives"]["reduce-scatter"]["runs"] >= 6 * 7
  assert 0 < report["mfu"] < 1


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--topology=v9:2x2"], "'v9:2x2'"),
    (["--topology=v5e"], "'v5e'"),
    ([], "give a topology"),
    (["--topology=cpu:8", "--config.mesh.fsdp=3"], "does not fit 8 devices"),
    (
      ["--topology=cpu:8", "--config.mllm.train.global_batch_size=12"],
      "global_batch_size 12 does not divide",
    ),
  ],
)
def test_what_cannot_be_planned_is_one_sentence(
  argv, message, arguments, capsys
):
  code, _, err = run(capsys, *arguments, *argv)
  assert code == 2
  assert message in err
  assert len(err.strip().splitlines()) == 1


def test_missing_compiler_names_the_command(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  for name in ("v5e:2x2", "h100:8"):
    with pytest.raises(ConfigError, match="pip install"):
      topology.prepare(topology.parse(name))


def test_report_of_what_does_not_fit_says_what_to_change():
  report = {
    "topology": "v5e:2x2",
    "what": "mllm",
    "variant": "argenseg_8b",
    "mesh": {"fsdp": 4},
    "fits": False,
    "bytes": {"parameters": 2**33},
    "excess": "Used 20G of 16G hbm.",
    "change": ["more chips"],
  }
  text = plan_tool.describe(report)
  assert "does not fit: Used 20G of 16G hbm." in text
  assert "to make it fit: more chips" in text
  report |= {"peak": 20 * 2**30, "hbm": 16 * 2**30}
  assert "4.00 GiB more than there is" in plan_tool.describe(report)


def test_changes_start_with_the_cheapest():
  from argenseg_jax import sharding
  from argenseg_jax.config import MeshConfig
  from argenseg_jax.config_parsing import replace, run_config
  from argenseg_jax.configs import base

  values = base.get_config()
  values.data.path = "unused"
  config = replace(run_config(values), {"mllm.train.remat": "dots"})
  mesh = sharding.make_mesh(MeshConfig(2, 4, 1))
  found = plan.changes(config, "mllm", mesh)
  assert found[0].startswith("mllm.train.remat=full")
  assert found[1].startswith("mllm.train.accumulate_steps=2")
  assert found[2].startswith("mesh.data=1")
