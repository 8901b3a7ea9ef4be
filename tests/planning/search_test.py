"""Settings enumerated and counted, chosen, compiled once, ranked."""

import json
import math
import threading

import jax
import pytest
from tiny_run import OVERRIDES, VOCAB

from argenseg_jax.config_parsing import replace, run_config
from argenseg_jax.configs import argenseg_8b_stage1
from argenseg_jax.planning import counted, search, search_space, topology
from argenseg_jax.tools import cli, plan_search

V5E = topology.parse("v5e:8x8")
V5P = topology.parse("v5p:4x4x4")


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


@pytest.fixture(scope="module")
def paper():
  config = run_config(argenseg_8b_stage1.get_config(), needs_data=False)
  return replace(config, {"mllm.train.global_batch_size": 256})


def space_of(config, *axes, topologies=(V5E,)):
  found = {a: v for a, v in search_space.parse_axes(axes, "mllm").items()}
  given = {text.partition("=")[0] for text in axes}
  found = {axis: values for axis, values in found.items() if axis in given}
  return search_space.enumerate_settings(config, "mllm", topologies, found)


def compiler(*, adds=2**30, failing=(), asked=None):
  """Reports of what was counted and `adds` bytes more."""
  lock = threading.Lock()

  def compile_setting(setting):
    with lock:
      if asked is not None:
        asked.append(setting.values)
    if setting.values.get("remat") in failing:
      raise search.CompileError("exit code -6: aborted")
    return {
      "peak": setting.counted.memory + adds,
      "step_seconds": setting.counted.seconds,
      "mfu": 0.5,
    }

  return compile_setting


def run(config, space, tmp_path, compile_setting, *, goal="speed", **kwargs):
  limits = search.Limits(**{"memory": 0.9, "compiled": 8, "jobs": 1, **kwargs})
  outcomes = search.run(
    space.given,
    space.settings,
    search.order(goal, {"v5e": 1.0, "v5p": 2.0}),
    compile_setting,
    limits=limits,
    results=tmp_path,
  )
  return search.summary(
    config, space, outcomes, limits, goal, {"v5e": 1.0, "v5p": 2.0}
  )


def test_memory_and_time_are_counted_as_they_were_compiled(paper, request):
  scale = request.config.rootpath / "docs" / "scale.json"
  compiled = json.loads(scale.read_text())["8B, v5e-64"]
  number = counted.count(paper, "mllm", V5E)
  held = ("parameters", "frozen parameters", "moments")
  state = sum(compiled["bytes"][part] for part in held)
  kept = 4 * 2048 * 4096 * 2 * 32  # Rows, positions, width, bytes, layers.
  # The counts of steps and of codes' uses aside.
  assert 0 <= number.memory - state - kept < 2**16
  assert number.memory < compiled["peak"]
  expected = compiled["step_seconds"], compiled["tokens_per_second"]
  assert (number.seconds, number.speed) == pytest.approx(expected, rel=0.01)
  turns = replace(paper, {"mllm.train.accumulate_steps": 4})
  more = counted.count(turns, "mllm", V5E)
  sums = 489_090_560  # Of gradients in float32, as large as the weights.
  assert more.memory - state - kept / 4 - sums == pytest.approx(0, abs=2**16)
  assert more.seconds > number.seconds  # Weights are gathered four times.


@pytest.mark.parametrize("remat", ["dots", "none"])
def test_what_keeps_more_counts_more_memory_and_less_work(paper, remat):
  full = counted.count(paper, "mllm", V5P)
  kept = counted.count(replace(paper, {"mllm.train.remat": remat}), "mllm", V5P)
  assert kept.memory > full.memory
  assert kept.work < full.work


def test_adapters_hold_less_and_muon_less_than_adamw(paper):
  space = space_of(paper, "lora=0,16", "optimizer=adamw,muon")
  adamw, muon, adapters, _ = [s.counted for s in space.given + space.settings]
  assert adapters.memory < muon.memory < adamw.memory
  assert adapters.work < adamw.work
  assert [s.gives_up for s in space.settings] == [
    ("muon",),
    ("adapters of rank 16 train",),
    ("adapters of rank 16 train", "muon"),
  ]


def test_an_axis_changes_what_it_says(paper):
  (setting,) = space_of(
    paper, "batch=8", "mesh=2x-1x2", "codes=before", "param_dtype=bfloat16"
  ).settings
  assert setting.flags == [
    "--config.mllm.train.global_batch_size=512",
    "--config.mllm.train.steps=6450",  # As many rows in all.
    "--config.mllm.optimizer.warmup_steps=194",
    "--config.mesh.data=2",
    "--config.mesh.tensor=2",
    "--config.mllm.train.param_dtype=bfloat16",
    "--config.data.cache_codes=True",
  ]
  assert setting.gives_up == (
    "batch 512 for 256",
    "weights in bfloat16",
    "masks tokenized before training",
  )


def test_what_cannot_be_built_is_counted_and_the_given_is_not_twice(paper):
  space = space_of(paper, "batch=1,4", "accumulate=1,2")
  assert len(space.given) == 1
  assert len(space.settings) == 2  # Batch 4 in one turn is what was given.
  ((sentence, times),) = space.refused.items()
  assert "does not divide into 128 parts" in sentence
  assert times == 1


def test_the_fastest_that_fits_is_found_without_compiling_all(paper, tmp_path):
  asked = []
  space = space_of(paper, "remat=none,dots,full", "batch=1,2,4,8")
  found = run(paper, space, tmp_path, compiler(asked=asked))
  best = found["compiled"][found["best"]["fastest"]]
  every = [s for s in space.settings if fits_with(s, 2**30)]
  fastest = max(s.counted.speed for s in every)
  assert best["speed"] == pytest.approx(fastest, rel=0.01)
  assert found["compiled"][0] == best
  assert asked[0] == {}  # The config as it is, to compare with.
  assert len(asked) < len(every)
  assert found["too_large_by_count"] > 0
  least = found["compiled"][found["best"]["least memory"]]
  assert least["peak"] < best["peak"]


def fits_with(setting, adds):
  return setting.counted.memory + adds <= 0.9 * 16 * 2**30


def test_what_hardly_fits_waits(paper, tmp_path):
  """The given one tells how much a compiler adds."""
  asked = []
  space = space_of(
    paper, "remat=dots", "batch=2", "param_dtype=float32,bfloat16"
  )
  adds = int(2.3 * 2**30)
  run(paper, space, tmp_path, compiler(adds=adds, asked=asked))
  assert [a.get("param_dtype") for a in asked] == [None, "bfloat16", "float32"]


def test_what_needs_no_less_than_what_did_not_fit_is_left_out(paper, tmp_path):
  asked = []
  space = space_of(paper, "remat=none,dots", "batch=1,2", "codes=step,before")
  found = run(paper, space, tmp_path, compiler(adds=2**40, asked=asked))
  assert found["best"] == {}
  # The given one, and nothing with as many rows, as much kept.
  tried = {(a["remat"], a["batch"]) for a in asked[1:]}
  assert len(asked) < 1 + len(space.settings)
  assert all(entry["state"] == "too large" for entry in found["compiled"])
  assert ("dots", "1") in tried  # Nothing says that this cannot fit.


def test_a_second_call_compiles_what_failed_alone(paper, tmp_path):
  space = space_of(paper, "remat=none", "batch=1", "codes=step")
  first, second = [], []
  broken = compiler(failing=("none",), asked=first)
  found = run(paper, space, tmp_path, broken, jobs=2)
  failed = [e for e in found["compiled"] if e["state"] == "failed"]
  assert {e["error"] for e in failed} == {"exit code -6: aborted"}
  assert found["best"]
  (given,) = (p for p in tmp_path.glob("*.json") if "as it is" in p.read_text())
  given.write_text(given.read_text()[:20])  # As after a full disk.
  run(paper, space, tmp_path, compiler(asked=second), jobs=2)
  assert len(second) == len(failed) + 1
  last = []
  run(paper, space, tmp_path, compiler(asked=last), compiled=len(first))
  assert last == []


def test_results_belong_to_what_is_compiled(paper):
  def key(**changes):
    config = replace(paper, changes)
    return search.key(space_of(config).given[0])

  assert key(**{"data.path": "elsewhere"}) == key()
  assert key(**{"mllm.train.remat": "dots"}) != key()
  here, there = space_of(paper, topologies=(V5E, V5P)).given
  assert search.key(here) != search.key(there)


@pytest.mark.parametrize("goal", ["cost", "fit"])
def test_goals_choose_among_topologies(paper, tmp_path, goal):
  space = space_of(paper, "remat=full", "batch=2", topologies=(V5E, V5P))
  found = run(paper, space, tmp_path, compiler(), goal=goal)
  name = {"cost": "cost", "fit": "peak"}[goal]
  values = [entry[name] for entry in found["compiled"]]
  assert values == sorted(values)
  assert found["compiled"][found["best"]["cheapest"]]["topology"] == "v5p:4x4x4"
  entry = found["compiled"][0]
  price = {"v5e": 1.0, "v5p": 2.0}[entry["topology"][:3]]
  expected = price * 64 / 3600 / entry["speed"] * 1e6
  assert math.isclose(entry["cost"], expected)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--vary=colour=1"], "no axis 'colour'"),
    (["--vary=remat="], "has no values"),
    (["--vary=remat=some"], "'mllm.train.remat' is 'some'"),
    (["--vary=batch=x"], "'x' is not a whole number"),
    (["--vary=batch=0"], "1 row or more"),
    (["--vary=mesh=4"], "write DATAxFSDPxTENSOR"),
    (["--vary=codes=never"], "neither 'step' nor 'before'"),
    (["--memory=0"], "--memory=0.0 must be above 0"),
    (["--memory=nan"], "--memory=nan must be above 0"),
    (["--compile=0"], "--compile=0 must be 1 or more"),
    (["--jobs=-1"], "--jobs=-1 must be 1 or more"),
    (["--goal=fame"], "goal"),
    (["--goal=cost"], "give the price of an hour of cpu"),
    (["--price=cpu=much"], "'cpu=much' is no price"),
    (["--price=v5e=2"], "'v5e=2' is no price"),
    (["--what=generate"], "leave --what out"),
    (["--config.tasks=('vqvae','mllm')"], "plans one task"),
    (["--topology=cpu:8,v9:2"], "'v9:2'"),
    (["--vary=mesh=3x1x1", "--config.mesh.fsdp=3"], "no setting can be built"),
    (["--nosearch", "--jobs=2"], "--jobs needs --search"),
  ],
)
def test_bad_values_are_one_sentence(argv, message, capsys, request, tmp_path):
  config = request.config.rootpath / "configs" / "tiny.py"
  code = cli.main(
    [
      *("plan", "--search", f"--config={config}", f"--results={tmp_path}"),
      *("--config.tasks=('mllm',)", "--topology=cpu:8", *argv),
    ]
  )
  err = capsys.readouterr().err
  assert code == 2
  assert message in err
  assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_search_from_the_command_line(capsys, request, tmp_path, monkeypatch):
  """One setting compiled for real, in a process of its own."""
  overrides = (*OVERRIDES, f"llm.vocab_size={VOCAB}")
  config = request.config.rootpath / "configs" / "tiny.py"
  argv = [
    *("plan", "--search", f"--results={tmp_path}", "--topology=cpu:8"),
    *(f"--config={config}", "--config.tasks=('mllm',)"),
    f"--config.model.overrides={overrides!r}",
    *("--config.data.cache_codes=True", "--config.mesh.fsdp=-1"),
    *("--config.mesh.data=1", "--config.mllm.optimizer.name=adamw"),
    *("--vary=remat=full", "--vary=batch=3", "--vary=mesh=1x-1x1"),
    *("--vary=param_dtype=float32", "--vary=accumulate=3"),
  ]
  assert cli.main([*argv, "--json", "--compile", "1"]) == 0
  found = json.loads(capsys.readouterr().out)
  (given,) = found["compiled"]
  assert given["state"] == "fits"
  assert given["peak"] > given["counted_memory"] > 0
  monkeypatch.setattr(
    plan_search,
    "compile_apart",
    lambda setting, argv: {"peak": setting.counted.memory},
  )
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  assert "compiled: 2 (1 kept from earlier calls): 2 fit" in out
  assert "changes the numbers: batch 24 for 16" in out
  assert "--config.mllm.train.accumulate_steps=3" in out


def test_a_process_without_a_report_is_a_failure(monkeypatch, paper):
  (setting,) = space_of(paper).given

  class Done:
    returncode, stdout, stderr = -9, "", ""

  monkeypatch.setattr(plan_search.subprocess, "run", lambda *a, **k: Done)
  with pytest.raises(search.CompileError, match="exit code -9: no message"):
    plan_search.compile_apart(setting, [])
  Done.returncode = 0
  with pytest.raises(search.CompileError, match="no report"):
    plan_search.compile_apart(setting, [])
