"""Every command that README and docs/ show runs, page by page, in order.

Each page is walked in a folder of its own, with data and checkpoints under the
names that it uses.
"""

import io
import pathlib
import re
import shutil

import pytest
from walks import walking

from argenseg_jax.planning import topology

# What is not run, by how the line begins, and why.
NOT_RUN = {
  "pip install": "installs; .ci/run does",
  "pytest": ".ci/run does",
  "argenseg demo": "waits for visitors; tests/tools/demo has it",
  "curl": "needs the demo's server; tests/tools/demo has it",
  "argenseg data build refer=/mnt": "needs Beam and a cluster",
}
# Pages that are walked, and what stands there for words that a reader replaces.
PAGES = {
  "README.md": {},
  "docs/own_masks.md": {"DIR/": "./", "annotations": "mine"},
  "docs/data.md": {},
  "docs/evaluation.md": {},
  "docs/image_tokenizer.md": {},
  "docs/serving.md": {"=DIR": "=runs/quickstart/mllm"},
  "docs/reliability.md": {
    " A B": " runs/mine/mllm runs/mine/mllm",
    " DIR": " runs/mine/mllm",
  },
}
# Pages that are not, and where their commands run instead.
NOT_WALKED = {
  "docs/pods.md": "pods and buckets: tests/runtime/gcs_workdir_test.py",
  "docs/tpu_vm_eval.md": "a rented machine and a bucket: docs/evaluation.md",
  "docs/weights.md": "the authors' weights: tests/torch_weights",
  "docs/index.md": "the quickstart, as README has it",
  "docs/finetuning.md": "a released folder: tests/training/adapters_test.py",
  "docs/rl.md": "a whole quickstart's model: tests/training/rl_test.py",
  "docs/scale.md": "hours of compilation: tests/planning/search_test.py",
  "docs/benchmarks.md": "hours of compilation: tests/tools/bench_*_test.py",
}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
  """Language and text of the fenced blocks of a page."""
  return _BLOCK.findall((walking.ROOT / page).read_text())


def commands(page: str) -> list[str]:
  """Command lines of a page, continued lines joined, parts of && apart."""
  found = []
  for language, text in blocks(page):
    if language or text.lstrip().startswith("{"):
      continue
    for line in text.replace("\\\n", " ").splitlines():
      found += [part.strip() for part in line.split("&&")]
  return [line for line in found if line and not line.startswith("#")]


def test_every_page_with_commands_is_walked():
  pages = [walking.ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
  pages += sorted((walking.ROOT / "docs").glob("*.md"))
  names = {str(p.relative_to(walking.ROOT)) for p in pages}
  shown = {
    name
    for name in names
    if any(line.startswith("argenseg") for line in commands(name))
  }
  assert shown <= {*PAGES, *NOT_WALKED}, "give these pages a row"


def test_the_list_of_what_is_not_run_is_short_and_used():
  lines = [line for page in PAGES for line in commands(page)]
  for start in NOT_RUN:
    assert any(line.startswith(start) for line in lines), start


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with data, runs/mine and an imported model, to be copied."""
  path = tmp_path_factory.mktemp("docs")
  walking.furnish(path)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(path)
    with walking.compiled_once(path.parent / "compiled"):
      walking.argenseg(
        "train",
        "--config=configs/own_masks.py",
        "--workdir=runs/mine",
        "--config.data.path=mine.jsonl",
        *walking.small_tiny(),
      )
      shutil.copytree("runs/mine", "runs/quickstart")
      walking.write_tokenizer(path / "tokenizer.json", "argenseg_8b")
      yield path


def sizes_of(words: list[str]) -> list[str]:
  if words[:2] == ["data", "build"]:
    return ["--workers=1"]  # Its workers would run pytest once more.
  if words[0] == "quickstart":
    return ["--minutes=0.01"]
  if words[0] not in ("train", "plan"):
    return []
  if any("own_masks" in w or "tiny" in w for w in words):
    return walking.small_tiny()
  return [
    *walking.small_variant(*walking.SMALL_IMAGES),
    "--config.data.sequence_length=256",
    "--config.data.mask_side=32",
    "--config.data.text_tokenizer=tokenizer.json",
    *(["--config.vqvae.train.global_batch_size=16"] * (words[0] == "plan")),
  ]


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_commands_of(page, trained, tmp_path, monkeypatch):
  here = tmp_path / "here"
  shutil.copytree(trained, here, symlinks=True)
  if page in ("README.md", "docs/own_masks.md"):
    shutil.rmtree(here / "runs")  # They begin with nothing.
  monkeypatch.chdir(here)
  ran = 0
  for line in commands(page):
    for word, other in PAGES[page].items():
      line = line.replace(word, other)
    if line.startswith(tuple(NOT_RUN)):
      continue
    if "--topology=v" in line and not topology.has_compiler("tpu"):
      continue
    if page == "docs/reliability.md":
      line = re.split(r" {3,}", line)[0]  # What it says follows.
    line, _, stdin = line.partition(" < ")
    words = walking.split(line)
    assert words[0] == "argenseg", line
    if stdin:
      given = io.StringIO(pathlib.Path(stdin).read_text())
      monkeypatch.setattr("sys.stdin", given)
    walking.argenseg(*words[1:], *sizes_of(words[1:]))
    ran += 1
  assert ran


@pytest.mark.long
def test_python_of_serving(trained, monkeypatch):
  monkeypatch.chdir(trained)
  text = next(t for lang, t in blocks("docs/serving.md") if lang == "python")
  names: dict = {}
  exec(compile(text, "docs/serving.md", "exec"), names)
  answer = names["answer"]
  assert answer.seg_mask.shape == (20, 30)
  assert len(answer.scale_masks) == 2
