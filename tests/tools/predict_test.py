"""`argenseg predict`, `warmup` and the cache of compiled programs."""

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from fake_predictor import predict, records
from PIL import Image

from argenseg_jax.data import image_codec, masks
from argenseg_jax.inference.answer_files import AnswerFiles
from argenseg_jax.runtime import compilation_cache
from argenseg_jax.tools import cli, warmup


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
  assert "a mask of 50.0% of the image (confidence -0.50)" in printed
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


def test_batches_are_traced(fake, folder, capsys):
  asked = ["--image", "in/a.png", "in/b.png", "--text", "cup", "--out=out"]
  assert predict(*asked, "--batch_size=1", "--profile=traces") == 0
  (file,) = folder.glob("traces/plugins/profile/predict_1-10/*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(file)).planes
  events = [e for plane in planes for line in plane.lines for e in line.events]
  steps = [dict(e.stats)["step_num"] for e in events if e.name == "predict"]
  assert steps == [1, 2]
  assert predict(*asked, "--force", "--profile=gs://bucket/traces") == 2
  assert "written to a disk only" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--text=cup"], "give both --image and --text"),
    ([], "give --image and --text, or --requests"),
    (["--image=in/none*", "--text=cup"], "in/none* contains no image"),
    (["--requests=none.jsonl"], "--requests none.jsonl: cannot read"),
    (["--requests=in/notes.txt"], "in/notes.txt, request 1: it is not JSON"),
    (["--image=in/a.png", "--text=a", "--out=x/y.png"], "folder x of --out"),
    (["--image=in", "--text=a", "--out=in/a.png"], "in/a.png is a file"),
    (["--image=in/a.png", "--text=a", "--write", "rle"], "needs a folder"),
    (
      ["--image=in/a.png", "--text=a", "--batch_size=0"],
      "--batch_size is 0",
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
  arguments = ["--batches", "1", "8", "--longest=50", "--num_scales=2"]
  assert cli.main(["warmup", "--checkpoint=x", *arguments]) == 0
  assert asked == {
    "batches": [1, 8],
    "longest": 50,
    "about_one_image": False,
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


def _ask(folder, *lines):
  path = folder / "requests.jsonl"
  path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
  return f"--requests={path}"


def _pixels(path):
  with Image.open(path) as image:
    return np.array(image)


def test_answers_never_overwrite_one_another(fake, folder):
  """Ids and stems whose files have names of others' files."""
  for stem in ("cup", "cup_overlay", "cup_2", "CUP"):
    Image.new("RGB", (6, 4)).save(folder / f"in/sub/{stem}.png")
  os.remove(folder / "in/sub/broken.jpg")
  asked = _ask(
    folder,
    {"image": "in/a.png", "text": "red", "id": "a_overlay"},
    {"image": "in/b.png", "text": "nothing", "id": "a"},
    {"image": "in/b.png", "text": "blue", "id": "a"},
    {"image": "in/b.png", "text": "blue", "id": "b"},
    {"image": "in/b.png", "text": "blue", "id": "b_mask"},
    {"image": "in/a.png", "text": "blue", "id": "b_strip"},
    {"image": "in/a.png", "text": "blue", "id": 7},
  )
  kinds = ("--write", "mask", "overlay", "strip", "rle")
  for number, options in enumerate(
    ((asked,), ("--image", "in/sub", "in", "--text", "cup", "nothing"))
  ):
    out = folder / f"out{number}"
    assert predict(*options, f"--out={out}", *kinds) == 0
    found = records(out / "predictions.jsonl")
    files = [name for record in found for name in record["files"].values()]
    assert len({name.casefold() for name in files}) == 3 * len(found)
    written = {p.name for p in out.iterdir()} - {"predictions.jsonl"}
    assert written == set(files)
    for record in found:  # Each file has what its own request was answered.
      files = {k: _pixels(out / name) for k, name in record["files"].items()}
      assert files["mask"].any() == bool(record["masks"])
      for kind in ("mask", "overlay"):
        assert files[kind].shape[:2] == _pixels(record["image"]).shape[:2]
  assert [r["id"] for r in records(folder / "out0/predictions.jsonl")] == [
    *("a_overlay", "a", "a", "b", "b_mask", "b_strip", "7")
  ]


@pytest.mark.parametrize(
  "options",
  [
    ("--image=in", "--text=cup", "--out=in"),
    ("--image=in/a.png", "--text=cup", "--out=in/a.png"),
    ("--image=in/a.png", "--text=cup", "--out=link.png"),
    ("--image=link.png", "--text=cup", "--out=in/a.png"),
    ("--image=hard.png", "--text=cup", "--out=in/a.png"),
    ("--image=in/../in/a.png", "--text=cup", "--out=./in/a.png"),
    ("--requests=predictions.jsonl", "--out=.", "--write", "rle"),
  ],
)
def test_inputs_are_never_outputs(options, fake, folder, capsys):
  (folder / "link.png").symlink_to("in/a.png")
  os.link(folder / "in/a.png", folder / "hard.png")
  line = {"image": "in/b.png", "text": "cup"}
  (folder / "predictions.jsonl").write_text(json.dumps(line))
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  assert predict(*options, "--force") == 2
  assert "is an input of this command" in capsys.readouterr().err
  after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  assert after == before
  assert not fake.batches


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("--out=m.jpg",), "without loss; use one of .png"),
    (("--out=m.JPEG",), "without loss"),
    (("--out=m.xyz",), "without loss"),
    (("--out=m.gif",), "without loss"),
    (("--out=in/a.png/m.png",), "folder in/a.png of --out does not exist"),
    (("--out=in/a.png/",), "is a file; give a folder"),
    (("--out=in/a.png/b/",), "is a file; give a folder"),
    (("--out=x\u0001.png",), "is no file name"),
    ((f"--out={'x' * 250}.png",), "too long for a file name"),
    (("--template=reffering",), "--template is 'reffering'; use one of"),
    (("--num_scales=0",), "--num_scales is 0"),
  ],
)
def test_outputs_are_checked_before_the_model_is_opened(
  options, message, folder, capsys, monkeypatch
):
  opened = []
  monkeypatch.setattr(
    warmup, "open_predictor", lambda *_, **__: opened.append(1)
  )
  before = sorted(folder.rglob("*"))
  assert predict("--image=in/a.png", "--text=cup", *options) == 2
  assert message in capsys.readouterr().err
  assert sorted(folder.rglob("*")) == before
  assert not opened


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "TIFF", "webp"])
def test_every_suffix_keeps_every_pixel(suffix, fake, folder):
  out = folder / f"m.{suffix}"
  assert predict("--image=in/b.png", "--text=cup", f"--out={out}") == 0
  with Image.open(out) as stored:
    seg_mask = np.array(stored.convert("L")) > 127
  np.testing.assert_array_equal(seg_mask, [[True] * 4 + [False] * 4] * 4)


def test_names_with_brackets_are_names_where_they_exist(fake, folder):
  (folder / "in[3]/x[1]").mkdir(parents=True)
  shutil.copy(folder / "in/a.png", folder / "in[3]/c.png")
  shutil.copy(folder / "in/a.png", folder / "in[3]/x[1]/d.png")
  (folder / "in/._a.png").write_text("of another system")
  for number, (pattern, ids) in enumerate(
    {
      "in[3]/*.png": ["c"],
      "in[3]/c.png": ["c"],
      "in[3]": ["c"],
      "*/x[1]/*.png": ["d"],
      "in[3]/**/*.png": ["c", "d"],
      "i[mn]/[ab].png": ["a", "b"],
      "in": ["a", "b"],
      str(folder / "in[3]/?.png"): ["c"],
    }.items()
  ):
    out = f"--out=out{number}/"
    assert predict("--image", pattern, "--text=cup", out, "--write", "rle") == 0
    found = records(folder / f"out{number}/predictions.jsonl")
    assert sorted(record["id"] for record in found) == ids


def test_two_commands_do_not_write_one_file(fake, folder, capsys, monkeypatch):
  """The second began before the first wrote."""
  out = folder / "out"
  options = ("--image", "in/a.png", "in/b.png", "--text=cup", f"--out={out}")
  opened = []

  def open_slowly(*_, **__):
    opened.append(1)
    if len(opened) == 1:
      assert predict(*options) == 0
    return fake

  monkeypatch.setattr(warmup, "open_predictor", open_slowly)
  assert predict(*options) == 2
  assert "another command writes" in capsys.readouterr().err
  assert len(records(out / "predictions.jsonl")) == 2
  with AnswerFiles(out, ".png", ("rle",), force=True):
    assert predict(*options, "--force") == 2
    assert "another command writes" in capsys.readouterr().err
  assert predict(*options, "--force") == 0
  assert len(records(out / "predictions.jsonl")) == 2


def test_an_image_is_decoded_and_seen_once(fake, folder, monkeypatch):
  read, seen = [], []
  decode, see = image_codec.decode_image, fake.set_image
  monkeypatch.setattr(
    image_codec, "decode_image", lambda p: read.append(p) or decode(p)
  )
  monkeypatch.setattr(fake, "set_image", lambda i: seen.append(1) or see(i))
  texts = [f"cup {i}" for i in range(7)]
  asked = ("--image", "in/a.png", "in/b.png", "--text", *texts)
  assert predict(*asked, "--out=out", "--batch_size=3") == 0
  assert len(read) == 2
  assert len(seen) <= 4
  read.clear()
  assert predict("--image=in/a.png", "--point", "1", "1", "--out=m.png") == 0
  assert len(read) == 1
