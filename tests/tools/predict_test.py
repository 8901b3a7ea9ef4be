"""`argenseg predict`, `warmup` and the cache of compiled programs."""

import io
import json
import re
import types

import jax
import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import masks
from argenseg_jax.inference.segment import Prediction
from argenseg_jax.runtime import compilation_cache
from argenseg_jax.tools import cli, warmup


class Fake:
  """Answers with the left half; remembers what was asked together."""

  def __init__(self):
    self.batches = []

  def segment_batch(self, images, texts, **options):
    self.batches.append((len(images), list(texts), options))
    return [
      self.answer(image, text)
      for image, text in zip(images, texts, strict=True)
    ]

  def set_image(self, image):
    def ask(texts, **options):
      self.batches.append((1, list(texts), options))
      return [self.answer(image, text) for text in texts]

    return types.SimpleNamespace(segment_batch=ask)

  def answer(self, image, text):
    seg_mask = np.zeros((1, *image.shape[:2]), bool)
    seg_mask[:, :, : image.shape[1] // 2] = True
    count = 0 if text == "nothing" else 1
    return Prediction(
      seg_masks=seg_mask[:count],
      text=text + "<mask>" * count,
      confidences=np.full((count,), -0.5, np.float32),
      codes=np.zeros((count, 5), np.int32),
      _draw_strip=lambda: np.zeros((2, 4, 4, 3), np.uint8),
      _pad_square=False,
    )


@pytest.fixture
def fake(monkeypatch):
  predictor = Fake()
  monkeypatch.setattr(warmup, "open_predictor", lambda *_, **__: predictor)
  return predictor


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Pictures a.png, b.png and sub/a.png; sub/broken.jpg."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "in/sub").mkdir(parents=True)
  for i, name in enumerate(("a", "b", "sub/a")):
    pixels = np.full((4, 6 + 2 * i, 3), 50, np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"in/{name}.png")
  (tmp_path / "in/sub/broken.jpg").write_text("no picture")
  (tmp_path / "in/notes.txt").write_text("no picture")
  return tmp_path


def predict(*arguments) -> int:
  return cli.main(["predict", "--checkpoint=x", *arguments])


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_picture_and_one_request_name_their_files(fake, folder, capsys):
  assert predict("--image=in/a.png", "--text=cup", "--out=cup.png") == 0
  seg_mask = np.asarray(Image.open("cup.png")) > 0
  np.testing.assert_array_equal(seg_mask[:, :3], True)
  np.testing.assert_array_equal(seg_mask[:, 3:], False)
  assert {p.name for p in folder.glob("cup*")} == {
    "cup.png",
    "cup_overlay.png",
    "cup_strip.png",
  }
  printed = capsys.readouterr().out
  assert "a mask of 50.0% of the picture (confidence -0.50)" in printed
  assert "'cup<mask>'" in printed


def test_folders_and_patterns_fill_a_folder(fake, folder, capsys):
  asked = ["--text", "cup", "nothing", "--image", "in", "in/sub/a*"]
  assert predict(*asked, "--out=out", "--write", "mask", "rle") == 0
  found = records(folder / "out/predictions.jsonl")
  names = ["a", "a_2", "b", "b_2", "a_3", "a_4"]
  assert [record["id"] for record in found] == names
  assert {p.stem for p in folder.glob("out/*.png")} == set(names)
  assert masks.load_seg_mask(found[4]["masks"][0]).sum() == 4 * 5
  assert found[1]["masks"] == []
  assert found[1]["confidence"] is None
  assert "answered 6 requests into out" in capsys.readouterr().out
  assert fake.batches[0] == (
    1,
    ["cup", "nothing"],
    {"num_scales": None, "answer_prefix": None, "template": ""},
  )
  assert predict(*asked, "--out=out", "--write", "rle") == 2
  assert "out/predictions.jsonl exists" in capsys.readouterr().err


def test_requests_come_from_stdin(fake, folder, monkeypatch, capsys):
  lines = [
    {"image": "in/a.png", "text": "cup", "id": "one"},
    {"image": "in/sub/broken.jpg", "text": "cup"},
    {"image": "in/b.png", "text": "hat", "answer_prefix": "the hat"},
  ]
  text = "\n".join(map(json.dumps, lines))
  monkeypatch.setattr("sys.stdin", io.StringIO(text))
  code = predict("--requests=-", "--out=out", "--write", "rle", "overlay")
  err = capsys.readouterr().err
  assert code == 2  # Of what can be answered nothing is lost.
  assert "cannot decode image in/sub/broken.jpg" in err
  assert "1 of 3 requests have no usable picture" in err
  found = records(folder / "out/predictions.jsonl")
  assert [record["id"] for record in found] == ["one", "b"]
  assert fake.batches[1][2]["answer_prefix"] == "the hat"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--text=cup"], "give both --image and --text"),
    ([], "give --image and --text, or --requests"),
    (["--image=in/none*", "--text=cup"], "in/none* holds no picture"),
    (["--requests=none.jsonl"], "cannot read --requests none.jsonl"),
    (["--requests=in/notes.txt"], "in/notes.txt, request 1: write"),
    (["--image=in/a.png", "--text=a", "--out=x/y.png"], "folder x of --out"),
    (["--image=in", "--text=a", "--out=in/a.png"], "in/a.png is a file"),
    (["--image=in/a.png", "--text=a", "--write", "rle"], "needs a folder"),
    (
      ["--image=in/a.png", "--text=a", "--batch-size=0"],
      "--batch-size is 0",
    ),
  ],
)
def test_bad_input_writes_nothing(arguments, message, fake, folder, capsys):
  before = sorted(folder.rglob("*"))
  assert predict(*arguments) == 2
  assert message in capsys.readouterr().err
  assert sorted(folder.rglob("*")) == before


def test_warmup_takes_the_options_of_predict(fake, capsys):
  asked = {}
  fake.warm_up = lambda **options: asked.update(options) or 4
  arguments = ["--batches", "1", "8", "--longest=50", "--num-scales=2"]
  assert cli.main(["warmup", "--checkpoint=x", *arguments]) == 0
  assert asked == {
    "batches": [1, 8],
    "longest": 50,
    "about_one_picture": False,
    "answer_prefix": None,
    "num_scales": 2,
  }
  assert capsys.readouterr().out.startswith("4 programs in ")


def test_a_point_or_a_box_asks_in_thousandths(fake, folder):
  assert predict("--image", "in/a.png", "--point", "3", "1") == 0
  place = ("--box", "0", "1", "6", "4")
  assert predict("--image", "in/a.png", *place, "--force") == 0
  asked = [(t, options["template"]) for _, t, options in fake.batches]
  assert asked == [
    (["[[500, 250]]"], "point"),
    (["[[0, 250, 1000, 1000]]"], "box"),
  ]


@pytest.mark.parametrize(
  ("more", "fault"),
  [
    (("--point", "7", "1"), r"6 x 4 pixels"),
    (("--point", "1", "1", "--text", "x"), "nothing else"),
    (("--point", "1", "1", "--box", "1", "1", "2", "2"), "not both"),
  ],
)
def test_places_that_cannot_be_asked_for(fake, folder, capsys, more, fault):
  assert predict("--image", "in/a.png", *more) == 2
  assert re.search(fault, capsys.readouterr().err)


def test_the_cache_is_the_users_and_can_be_switched_off(tmp_path, monkeypatch):
  monkeypatch.setattr(
    jax.config, "update", lambda name, value: asked.update({name: value})
  )
  if jax.config.jax_compilation_cache_dir:
    pytest.skip("JAX has a cache already")
  asked = {}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert compilation_cache.enable() is None  # `conftest` switched it off.
  monkeypatch.delenv(compilation_cache.SWITCH)
  found = compilation_cache.enable()
  assert found.parent == tmp_path / "argenseg_jax"
  assert asked == {"jax_compilation_cache_dir": str(found)}
  monkeypatch.setenv(compilation_cache.SWITCH, str(tmp_path / "mine"))
  assert compilation_cache.enable() == tmp_path / "mine"
