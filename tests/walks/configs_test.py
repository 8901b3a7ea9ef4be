"""Each file in configs/ trains, resumes, is planned and measured as it is.

Sizes and paths are all that changes; data have a user's layout, and the text
tokenizer of a released model has that model's ids.
"""

import json
import pathlib
import shutil

import pytest
from walks import walking

pytestmark = pytest.mark.long

# Config -> what it reads, and the variant whose text tokenizer it needs.
WITH_TEXT = {
  "own_masks": ("jsonl=mine.jsonl", None),
  "argenseg_8b_stage1": ("jsonl=chat.jsonl", "argenseg_8b"),
  "argenseg_8b_refcoco": ("refer=refcoco", "argenseg_8b"),
  "argenseg_1b": ("grefer=grefcoco", "argenseg_1b"),
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("configs")
  walking.furnish(path)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(path)
    with walking.compiled_once(path / "compiled"):
      yield path


def paths_of(name: str) -> list[str]:
  layout, _, path = WITH_TEXT[name][0].partition("=")
  return [f"--config.data.source={layout}", f"--config.data.path={path}"]


def sizes_of(name: str) -> list[str]:
  variant = WITH_TEXT[name][1]
  if variant is None:
    return walking.small_tiny()
  tokenizer = pathlib.Path(f"{variant}.json")
  if not tokenizer.exists():
    walking.write_tokenizer(tokenizer, variant)
  return [
    *walking.small_variant(*walking.SMALL_IMAGES),
    f"--config.data.text_tokenizer={tokenizer}",
    "--config.data.sequence_length=256",
    "--config.data.mask_side=32",
  ]


def losses(path: pathlib.Path) -> dict[int, float]:
  lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def walk(name: str, given: list[str], task: str) -> pathlib.Path:
  """Plans, trains two steps, loses the second and takes it again."""
  config = f"--config=configs/{name}.py"
  said = walking.argenseg("plan", config, "--topology=cpu:2", *given)
  assert "needs" in said
  workdir = pathlib.Path("runs") / name
  train = ("train", config, f"--workdir={workdir}", *given)
  walking.argenseg(*train)
  before = losses(workdir / task)
  assert sorted(before) == [1]
  shutil.rmtree(workdir / task / "checkpoints" / "2")
  for results in (workdir / "results.json", workdir / task / "results.json"):
    results.unlink(missing_ok=True)
  walking.argenseg(*train)
  steps = sorted(p.name for p in (workdir / task / "checkpoints").iterdir())
  assert {"1", "2"} <= set(steps)
  return workdir / task


@pytest.mark.parametrize("name", WITH_TEXT)
def test_a_decoder_of(name):
  given = [*paths_of(name), *sizes_of(name)]
  trained = walk(name, given, "mllm")
  said = walking.argenseg("eval", f"--checkpoint={trained}")
  assert "ciou" in said.lower()
  assert (trained / "tokenizer.json").exists()
