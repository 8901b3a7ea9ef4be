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


def walk(
  name: str, given: list[str], task: str, workdir: str = ""
) -> pathlib.Path:
  """Plans, trains two steps, loses the second and takes it again."""
  path = pathlib.Path(workdir or f"runs/{name}")
  config = f"--config=configs/{name}.py"
  said = walking.argenseg("plan", config, "--topology=cpu:2", *given)
  assert "needs" in said
  train = ("train", config, f"--workdir={path}", *given)
  walking.argenseg(*train)
  before = losses(path / task)
  assert sorted(before) == [1, 2]
  shutil.rmtree(path / task / "checkpoints" / "2")
  for results in (path / "results.json", path / task / "results.json"):
    results.unlink(missing_ok=True)
  walking.argenseg(*train)
  assert losses(path / task) == before  # The second step, once more.
  steps = sorted(p.name for p in (path / task / "checkpoints").iterdir())
  assert {"1", "2"} <= set(steps)
  return path / task


@pytest.mark.parametrize("name", WITH_TEXT)
def test_a_decoder_of(name):
  given = [*paths_of(name), *sizes_of(name)]
  trained = walk(name, given, "mllm")
  said = walking.argenseg("eval", f"--checkpoint={trained}")
  assert "ciou" in said.lower()
  assert (trained / "tokenizer.json").exists()


def test_reinforcement_of_a_decoder():
  """With its checkpoint as the start that it is held to."""
  given = [*paths_of("own_masks"), *sizes_of("own_masks")]
  walking.argenseg(
    "train", "--config=configs/own_masks.py", "--workdir=runs/start", *given
  )
  more = [
    "--config.init_from=runs/start/mllm",
    "--config.eval.splits=('train',)",
  ]
  more += ["--config.data.answer=<mask>", "--config.rl.train.eval_every=1"]
  trained = walk("tiny_rl", [*given, *more], "rl")
  said = walking.argenseg("eval", f"--checkpoint={trained}")
  assert "ciou" in said.lower()


# Config -> data in the four forms that users have; the last is packed.
IMAGE_TOKENIZERS = {
  "vqvae_masks_256": "jsonl=mine.jsonl",
  "vqvae_masks_512": "image_folder=seg_masks",
  "vqvae_images_256": "refer=refcoco",
  "vqvae_images_512": "image_folder=images",
}


def tokenizer_sizes(name: str, given: str) -> list[str]:
  side = name.rpartition("_")[2]
  layout, _, path = given.partition("=")
  small = walking.SMALL_IMAGES
  if side == "512":  # Its scales stay real.
    small = walking.REAL_SCALES
  return [
    *walking.small_variant(*small),
    *([] if side == "512" else ["--config.data.mask_side=32"]),
    "--config.vqvae.train.compute_dtype=float32",
    f"--config.data.source={layout}",
    f"--config.data.path={path}",
  ]


@pytest.mark.parametrize("name", IMAGE_TOKENIZERS)
def test_an_image_tokenizer_of(name):
  """It needs no text tokenizer, and nothing of the decoder is kept."""
  given = tokenizer_sizes(name, IMAGE_TOKENIZERS[name])
  trained = walk(name, given, "vqvae")
  assert not (trained / "tokenizer.json").exists()
  kept = walking.argenseg("checkpoint", "inspect", str(trained))
  assert "codebook" in kept
  assert "llm" not in kept
  measure = ("eval", "--what=tokenizer", f"--checkpoint={trained}")
  said = walking.argenseg(*measure)
  assert ("psnr" if "images" in name else "boundary_f") in said
  assert "perplexity" in said


def test_an_image_tokenizer_is_packed_exported_and_built_upon():
  """From ArrayRecord, to VAR's layout and back, and into a decoder."""
  build = ("data", "build", "refer=refcoco", "--split=train")
  walking.argenseg(*build, "--out=packed", "--workers=1")
  given = tokenizer_sizes("vqvae_masks_256", "array_record=packed")
  trained = walk("vqvae_masks_256", given, "vqvae", "runs/packed")
  walking.argenseg("export", "--from", str(trained), "--to", "var")
  (file,) = pathlib.Path("var").glob("*.safetensors")
  again = ("import", "--from", str(file), "--to", "runs/again")
  walking.argenseg(*again, "--scales=1,2")
  said = walking.argenseg("checkpoint", "diff", str(trained), "runs/again")
  assert "0" in said
  walking.argenseg(
    "train",
    "--config=configs/argenseg_8b_stage1.py",
    "--workdir=runs/decoder",
    "--config.init_from=runs/again",
    *paths_of("argenseg_8b_stage1"),
    *sizes_of("argenseg_8b_stage1"),
  )
