"""Every row of docs/features.md through the command."""

import pathlib

import pytest
from walks import features, walking


def test_the_page_is_made_of_the_rows():
  made = walking.ROOT / "docs" / "features.md"
  assert made.read_text() == features.page(), (
    "run `python -m walks.features > ../docs/features.md` in tests/"
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("features")
  walking.furnish(path)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(path)
    walking.write_tokenizer(path / "tokenizer.json", "argenseg_8b")
    with walking.compiled_once(path / "compiled"):
      yield path


def sizes_of(words: list[str]) -> list[str]:
  if words[0] != "train":
    return []
  if "--config=configs/argenseg_8b_stage1.py" in words:
    return [
      *walking.small_variant(*walking.REAL_SCALES),
      "--config.data.text_tokenizer=tokenizer.json",
      "--config.data.sequence_length=2560",
      "--config.mllm.train.steps=1",
    ]
  sizes = walking.small_tiny()
  if "--config.data.codes=codes.npz" in words:
    sizes += ["--config.data.cache_codes=False"]
  if "--config.data.mask_channels=3" in words or "reason" in str(words):
    sizes += ["--config.data.sequence_length=320"]
  first = "--workdir=runs/mine" in words
  if not (first or "--config.tasks=('rl',)" in words):
    tokenizer = str(pathlib.Path("runs/mine/vqvae").absolute())
    sizes += [
      "--config.tasks=('mllm',)",
      f"--config.init_from={tokenizer}",
    ]
  return sizes


@pytest.mark.long
@pytest.mark.parametrize("row", features.FEATURES, ids=lambda row: row.name)
def test_feature(row, folder):
  for command in row.commands:
    words = walking.split(command)[1:]
    said = walking.argenseg(*words, *sizes_of(words))
  for part in row.shown:
    assert part in said
