"""Runs command lines as a user types them, at the smallest sizes.

A walk has a folder of its own with data in the layouts that users have. What a
line says is run as it stands; only sizes are added after it.
"""

import contextlib
import io
import json
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys

import jax
from data import layouts
from PIL import Image
from tiny_run import OVERRIDES

from argenseg_jax.data.text import SPECIAL_TOKENS, TextTokenizer
from argenseg_jax.tools import cli
from argenseg_jax.variants import VARIANTS

ROOT = pathlib.Path(__file__).parents[2]
ROWS = 8  # A row for each fake device.
# Of a released variant; what is left out (vocabulary, codes) stays real.
SMALL = (
  "vision.image_side=28",
  "vision.width=16",
  "vision.num_layers=1",
  "vision.num_heads=2",
  "vision.mlp_width=16",
  "llm.width=16",
  "llm.num_layers=1",
  "llm.num_heads=2",
  "llm.num_kv_heads=1",
  "llm.head_dim=8",
  "llm.mlp_width=16",
  "vqvae.width=32",
  "vqvae.blocks_per_level=1",
)
# An image tokenizer of the real architecture on small images, and one with real
# scales and as little else as possible.
SMALL_IMAGES = (
  "vqvae.image_side=32",
  "vqvae.scales=(1,2)",
  "vqvae.width_multipliers=(1,1,1,1,1)",
)
REAL_SCALES = ("vqvae.patch_side=16", "vqvae.width_multipliers=(1,)")


def small_variant(*more: str) -> list[str]:
  """Sizes of a config that names a released variant."""
  return [
    f"--config.model.overrides={(*SMALL, *more)!r}",
    "--config.data.image_side=28",
    "--config.data.threads=1",
    *_run_lengths(),
  ]


def small_tiny() -> list[str]:
  """Sizes of a config on the variant `tiny`."""
  vocab = TextTokenizer().token_ids.first_code + 16
  return [
    f"--config.model.overrides={(*OVERRIDES, f'llm.vocab_size={vocab}')!r}",
    *_run_lengths(),
  ]


def _run_lengths() -> list[str]:
  flags = {
    "tokenizer_training.warm_start_steps": 1,
    "tokenizer_training.kmeans_seg_masks": 8,
    "eval.max_samples": 2,
    "eval.batch_size": ROWS,
    "eval.max_text": 4,
  }
  for task in ("vqvae", "mllm", "rl"):
    flags |= {
      f"{task}.train.steps": 2,
      f"{task}.train.global_batch_size": ROWS,
      f"{task}.train.save_every": 1,
      f"{task}.train.log_every": 1,
    }
  return [f"--config.{key}={value}" for key, value in flags.items()]


def argenseg(*argv: str, code: int = 0) -> str:
  """What a command prints.

  Raises:
    AssertionError: it ends with another exit code.
  """
  line = [str(argument) for argument in argv]
  if line[0] == "plan":  # It changes how many devices its process has.
    command = [sys.executable, "-m", "argenseg_jax.tools.cli", *line]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    ended, said, why = ran.returncode, ran.stdout, ran.stderr
  else:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      ended = cli.main(line)
    said, why = out.getvalue(), err.getvalue()
  assert ended == code, f"{shlex.join(line)}\n{why}"
  return said


def split(line: str) -> list[str]:
  """The words of a command line without what stands in brackets."""
  line = re.sub(r"\[--.*?\]", "", line)
  return [os.path.expandvars(w) for w in shlex.split(line, comments=True)]


@contextlib.contextmanager
def compiled_once(folder: pathlib.Path):
  """Programs are kept in a folder: what two commands share is compiled once."""
  names = {
    "jax_compilation_cache_dir": str(folder),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in names.items():
    jax.config.update(name, value)
  try:
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
      yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def write_tokenizer(path: pathlib.Path, variant: str) -> pathlib.Path:
  """A `tokenizer.json` of bytes with the ids of a released vocabulary.

  Args:
    path: of the file.
    variant: whose ids the special tokens have.
  """
  ids = VARIANTS[variant].token_ids
  made = json.loads(_shipped())
  special = {getattr(ids, f): text for f, text in SPECIAL_TOKENS.items()}
  special[ids.pad] = "</s>" if ids.bos is not None else "<|endoftext|>"
  if ids.bos is not None:
    special[ids.bos] = "<s>"
    template = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    made["post_processor"] = {
      "type": "TemplateProcessing",
      "single": [template, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
      "special_tokens": {
        "<s>": {"id": "<s>", "ids": [ids.bos], "tokens": ["<s>"]}
      },
    }
  letters = [t for t in made["model"]["vocab"] if len(t) == 1]
  free = (i for i in range(ids.first_code) if i not in special)
  vocab = {letter: next(free) for letter in letters}
  vocab |= {f"[unused{i}]": i for i in free}
  vocab |= {text: i for i, text in special.items()}
  made["model"] |= {"vocab": vocab, "merges": []}
  kind = made["added_tokens"][0]
  made["added_tokens"] = [
    kind | {"id": i, "content": text} for i, text in sorted(special.items())
  ]
  path.write_text(json.dumps(made))
  return path


def _shipped() -> str:
  return pathlib.Path(TextTokenizer().name).read_text()


def furnish(folder: pathlib.Path) -> None:
  """Writes data in every layout, under the names that the pages use."""
  folder.mkdir(exist_ok=True)
  (folder / "configs").symlink_to(ROOT / "configs")
  for layout, name in (
    ("refer", "refcoco"),
    ("grefer", "grefcoco"),
    ("reason_seg", "reason_seg"),
    ("ade20k", "ADEChallengeData2016"),
    ("coco_panoptic", "coco"),
    ("text_to_image", "drawings"),
    ("folder", "folder"),
    ("meta", "mixture"),
  ):
    (folder / name).mkdir()
    layouts.write(layout, folder / name)
  for name in ("refcoco", "grefcoco"):
    _all_splits(folder / name)
  records = layouts.jsonl_records(folder)
  one, several, turns, question, _ = records
  right = {"image": "b.jpg", "mask": "masks/right.png"}
  asked = layouts.chat("<image>\nthe blue box", "<mask>")
  mine = [one, right | {"conversations": asked}]
  two = layouts.chat("<image>\n<image>\nthe box of the second", "<mask>")
  files = {
    "mine.jsonl": mine,
    "several.jsonl": [several],
    "turns.jsonl": [turns],
    "two_images.jsonl": [
      {
        "image": ["a.jpg", "b.jpg"],
        "mask": "masks/right.png",
        "conversations": two,
      }
    ],
    "chat.jsonl": [*mine, question],
    "pope.jsonl": [_question("is there a box?", label="yes")],
    "vqa.jsonl": [_question("how many?", answers=["two", "2", "three"])],
    "choice.jsonl": [
      _question("which?", answer="B", choices=["a cat", "a box"])
    ],
    "captions.jsonl": [
      {
        "image": "a.jpg",
        "kind": "caption",
        "conversations": layouts.chat(
          "<image>\nDescribe this image in one sentence.", "two boxes"
        ),
      }
    ],
  }
  for name, lines in files.items():
    layouts.write_lines(folder / name, lines)
  for number, name in enumerate(("PHOTO.jpg", "photo.jpg")):
    layouts.image(folder / name, number)
  (folder / "photos").mkdir()
  (folder / "more").mkdir()
  layouts.image(folder / "photos" / "one.jpg", 0)
  layouts.image(folder / "more" / "two.jpg", 1)
  layouts.write_lines(
    folder / "requests.jsonl", [{"image": "a.jpg", "text": "the left box"}]
  )
  (folder / "seg_masks").mkdir()
  (folder / "images").mkdir()
  layouts.mask(folder / "seg_masks" / "left.png", layouts.LEFT)
  layouts.mask(folder / "seg_masks" / "more" / "right.png", layouts.RIGHT)
  for number in range(2):
    layouts.image(folder / "images" / f"{number}.jpg", number)


def _question(text: str, **more) -> dict:
  return {"image": "a.jpg", "question": text, **more}


def _all_splits(folder: pathlib.Path) -> None:
  """Every split that RefCOCO has holds what "val" holds."""
  (path,) = folder.glob("*refs(unc).*")
  text = path.suffix == ".json"
  refs = json.loads(path.read_text()) if text else _unpickled(path)
  (val,) = (ref for ref in refs if ref["split"] == "val")
  refs += [
    val | {"split": name, "ref_id": 10 + i}
    for i, name in enumerate(("testA", "testB"))
  ]
  if text:
    path.write_text(json.dumps(refs))
  else:
    path.write_bytes(pickle.dumps(refs, 2))


def _unpickled(path: pathlib.Path) -> list[dict]:
  return pickle.loads(path.read_bytes())


def image_of(path: pathlib.Path) -> Image.Image:
  with Image.open(path) as opened:
    return opened.copy()
