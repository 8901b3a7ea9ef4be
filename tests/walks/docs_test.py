"""Every command that README and docs/ show runs, page by page, in order.

Each page is walked in a folder of its own, with data and checkpoints under the
names that it uses. gs:// addresses stand for folders there.
"""

import io
import os
import pathlib
import re
import shutil

import pytest
from walks import walking

# What is not run, by how the line begins, and why.
NOT_RUN = {
  "pip install": "installs; .ci/run does",
  "python3 -m venv": "installs; .ci/run does",
  "python3.11 -m venv": "installs on a rented machine",
  "sudo apt-get": "installs on a rented machine",
  "git clone": "needs the repository's address",
  "ruff format": ".ci/run does",
  "gcloud": "needs a Google Cloud project",
  "python -c": "runs other people's code, or asks for a TPU",
  "python -m argenseg_jax.tools.compile_kernels": "takes hours of compilation",
  "argenseg bench kernels": "takes half an hour of compilation",
  "argenseg demo": "waits for visitors; tests/tools/demo has it",
  "curl": "needs the demo's server; tests/tools/demo has it",
  "argenseg data build refer=/mnt": "needs Beam and a cluster",
}
# Pages, what stands for their capital words, and the lines of a synopsis, whose
# commands stand in full elsewhere.
PAGES = {
  "README.md": {},
  "CONTRIBUTING.md": {},
  "docs/own_masks.md": {"DIR/": "./", "annotations": "mine"},
  "docs/data.md": {"HOST": "host"},
  "docs/evaluation.md": {},
  "docs/serving.md": {"=DIR": "=runs/quickstart/mllm"},
  "docs/pods.md": {},
  "docs/tpu_vm_eval.md": {},
  "docs/reliability.md": {
    " A B": " runs/mine/mllm runs/mine/mllm",
    " DIR": " runs/mine/mllm",
  },
  "docs/weights.md": {"FILE.jsonl": "mine.jsonl"},
  "docs/benchmarks.md": {},
}
SYNOPSES = ("argenseg import --from DIR", "argenseg export --from CHECKPOINT")
SYNOPSES += ("argenseg parity DIR",)
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


def reason_not_to_run(line: str) -> str | None:
  for start, reason in NOT_RUN.items():
    if line.startswith(start):
      return reason
  return None


def test_every_page_with_commands_is_walked():
  pages = [walking.ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
  pages += sorted((walking.ROOT / "docs").glob("*.md"))
  names = {str(p.relative_to(walking.ROOT)) for p in pages}
  shown = {
    name
    for name in names
    if any(line.startswith("argenseg") for line in commands(name))
  }
  assert shown <= set(PAGES), "give these pages a row in PAGES"


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
      yield path


def sizes_of(words: list[str]) -> list[str]:
  if words[0] not in ("train", "plan"):
    return []
  if any("own_masks" in w or "tiny" in w for w in words):
    return walking.small_tiny()
  return [
    *walking.small_variant(*walking.SMALL_IMAGES),
    "--config.data.sequence_length=256",
    "--config.data.mask_side=32",
    "--config.data.text_tokenizer=tokenizer.json",
  ]


WALKED = ("docs/own_masks.md", "docs/data.md", "docs/evaluation.md")
WALKED += ("docs/serving.md", "docs/reliability.md")


@pytest.mark.long
@pytest.mark.parametrize("page", WALKED)
def test_commands_of(page, trained, tmp_path, monkeypatch):
  here = tmp_path / "here"
  shutil.copytree(trained, here, symlinks=True)
  if page == "docs/own_masks.md":
    shutil.rmtree(here / "runs")
  monkeypatch.chdir(here)
  monkeypatch.setenv("HOME", str(here))
  ran = 0
  for line in commands(page):
    for word, other in PAGES[page].items():
      line = line.replace(word, other)
    if reason_not_to_run(line) or line.startswith(SYNOPSES):
      continue
    if page == "docs/reliability.md":
      line = re.split(r" {3,}", line)[0]  # What it says follows.
    line, _, stdin = line.partition(" < ")
    words = [os.path.expanduser(w) for w in walking.split(line)]
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
