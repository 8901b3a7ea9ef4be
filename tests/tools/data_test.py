"""`argenseg data`: what it says of good and of faulty sources."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
from data import layouts
from PIL import Image, ImageFilter

from argenseg_jax.config import DataConfig
from argenseg_jax.data.sources.registry import open_source
from argenseg_jax.tools import cli
from argenseg_jax.visualize import contact_sheet

SIZES = {"image_side": 64, "max_masks": 2}


def _data(capsys, *argv):
  code = cli.main(["data", *argv])
  out = capsys.readouterr()
  return code, out.out, out.err


def test_check_counts_what_a_source_holds(capsys, tmp_path):
  path = layouts.write("meta", tmp_path)["path"]
  code, out, _ = _data(capsys, "check", f"meta={path}")
  assert code == 0
  assert "data: 6 requests (4 referring, 2 text), 2 images, 5 masks" in out
  # Each wording of two objects; the pictures are two here, too.
  assert "refs: 4 requests (4 referring), 2 images, 4 masks" in out
  assert ": 0 faults" in out


def test_check_names_every_fault_and_goes_on(capsys, tmp_path):
  records = layouts.jsonl_records(tmp_path)
  (tmp_path / "b.jpg").unlink()
  lines = [json.dumps(r) for r in records]
  lines[4] = '{"conversations": '
  text_only = {"conversations": [{"from": "gpt", "value": "hello"}]}
  lines.append(json.dumps(text_only))
  path = tmp_path / "data.jsonl"
  path.write_text("\n".join(lines))
  code, out, _ = _data(
    capsys, "check", f"folder={tmp_path / 'none'}", f"jsonl={path}"
  )
  assert code == 1
  faults = [x for x in out.splitlines() if x.startswith("  fault: ")]
  assert len(faults) == 5
  assert "none contains no images" in faults[0]
  assert "record 1: " in faults[1]
  assert "b.jpg" in faults[1]
  assert "b.jpg" in faults[2]
  assert f"{path} line 5 is not JSON" in faults[3]
  assert f"{path} line 6: a conversation must begin" in faults[4]
  # A conversation of two answers counts as two requests.
  assert "data: 3 requests (3 referring), 1 images, 3 masks" in out


def test_check_of_real_photographs(capsys, request):
  real = request.config.rootpath.parent / "shared" / "real" / "coco33"
  if not real.is_dir():
    pytest.skip("the photographs are not here")
  sources = [f"refer={real}", f"grefer={real}", f"jsonl={real}/coco33.jsonl"]
  code, out, _ = _data(capsys, "check", *sources)
  assert code == 0
  assert "62 requests (62 referring), 26 images, 62 masks" in out
  assert "102 requests (84 referring, 18 absent)" in out


def test_check_reads_as_a_run_would(capsys, tmp_path, request):
  path = layouts.write("jsonl", tmp_path)["path"]
  own = request.config.rootpath / "configs" / "own_masks.py"
  config = [f"--config={own}", f"--config.data.path={path}"]
  code, out, _ = _data(capsys, "check", *config)
  assert code == 1
  assert "line 2 has 2 masks; max_masks is 1" in out
  config.append("--config.data.max_masks=2")
  assert "does not fit sequence_length" in _data(capsys, "check", *config)[1]
  config.append("--config.data.sequence_length=400")
  assert _data(capsys, "check", *config)[0] == 0


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["count"], "unknown sub-command 'count'"),
    (["check"], "give a source: LAYOUT=PATH"),
    (["check", "refcoco"], "source 'refcoco' is not LAYOUT=PATH"),
    (["check", "jsonl=x", "--fast"], "unknown argument '--fast'"),
    (["show", "jsonl=x", "--out=none/sheet.png"], "folder none of --out"),
    (["show", "jsonl=x", "--checkpoint=none"], "none does not exist"),
  ],
)
def test_bad_arguments_are_one_sentence(argv, message, capsys, tmp_path):
  code, _, err = _data(capsys, *argv)
  assert code == 2
  assert message in err
  assert len(err.strip().splitlines()) == 1


def test_show_draws_a_line_for_each_record(capsys, tmp_path):
  path = layouts.write("jsonl", tmp_path)["path"]
  out = tmp_path / "sheet.png"
  show = ["show", f"jsonl={path}", f"--out={out}"]
  assert _data(capsys, *show, "--first=3", "--count=9")[0] == 0
  two = cv2.imread(str(out)).shape
  assert _data(capsys, *show)[0] == 2  # It is not written over.
  assert _data(capsys, *show, "--force")[0] == 0
  five = cv2.imread(str(out)).shape
  assert five[1] == two[1]
  assert five[0] > 2 * two[0]
  code, _, err = _data(capsys, *show, "--force", "--first=5")
  assert code == 2
  assert "none of the 5 records" in err


def test_odd_masks_are_counted_and_shown(capsys, tmp_path):
  records = layouts.jsonl_records(tmp_path)
  soft = Image.fromarray(layouts.LEFT).convert("L")
  soft.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "masks" / "left.png")
  records.append(records[3] | {"mask": ["masks/right.png"]})
  records[-1]["conversations"] = layouts.chat("<image>\nit", "<mask>")
  asked = layouts.chat("<image>\nIs there a box?", "maybe")
  records.append({"image": "a.jpg", "conversations": asked, "kind": "yes_no"})
  path = layouts.write_lines(tmp_path / "data.jsonl", records)
  code, said, _ = _data(capsys, "check", f"jsonl={path}")
  assert code == 1
  assert "masks: 3 soft: 0 to 255" in said
  assert "masks: 3 two values: 0, 255" in said
  assert "line 7: true answer 'maybe' is neither yes nor no" in said
  out = tmp_path / "odd.png"
  code, _, _ = _data(capsys, "show", f"jsonl={path}", f"--out={out}", "--odd")
  assert code == 0
  code, said, _ = _data(
    capsys,
    *("show", f"jsonl={path}", f"--out={out}.png", "--odd", "--first=7"),
  )
  assert "from 7 on is odd" in said
  assert code == 0


def _rows(tmp_path):
  return layouts.rows(
    **layouts.write("jsonl", tmp_path),
    sequence_length=120,
    image_side=8,
    mask_side=8,
  )


def test_token_layout_says_what_each_position_is(tmp_path):
  rows = _rows(tmp_path)
  special = rows.tokenizer.token_ids
  fields = rows(0).fields
  layout = contact_sheet.token_layout(fields, special.img_context)
  names = list(contact_sheet.LAYOUT)
  counts = {n: np.count_nonzero(layout == i) for i, n in enumerate(names)}
  used = np.count_nonzero(fields.segment_ids)
  assert counts["padding"] == 120 - used
  assert (counts["image"], counts["code to learn"]) == (4, 5)
  # Codes are predicted from <ge_start> on, up to the slot before <ge_end>.
  start = int(np.flatnonzero(fields.tokens == special.ge_start)[0])
  assert names[layout[start]] == "code to learn"
  assert names[layout[start + 4]] == "code to learn"
  assert fields.tokens[start + 5] == special.ge_end
  assert counts["text to learn"] == 1  # <|im_end|>
  assert names[layout[used - 2]] == "text to learn"


def test_captions_are_what_was_said(tmp_path):
  rows = _rows(tmp_path)
  arrow = "\N{RIGHTWARDS ARROW}"
  captions = [
    contact_sheet.turns(rows(i).fields, rows.tokenizer) for i in range(4)
  ]
  assert captions == [
    ["the left box", f"{arrow} <mask>"],
    ["both boxes", f"{arrow} <mask> and <mask>"],
    [
      *("the left box", f"{arrow} <mask>"),
      *("and the right one?", f"{arrow} It is blue: <mask>"),
    ],
    ["how many?", f"{arrow} two"],
  ]
  asked = layouts.chat("<image>\nthe user\nassistant", "<mask>")
  system = [{"from": "system", "value": "You help."}]
  sample = dataclasses.replace(rows.source[0], conversation=(*system, *asked))
  said = contact_sheet.turns(rows.row(sample).fields, rows.tokenizer)
  assert said == ["the user\nassistant", f"{arrow} <mask>"]


def test_show_asks_for_reconstructions_of_the_masks(tmp_path):
  rows, seen = _rows(tmp_path), []

  def reconstruct(seg_masks):
    seen.append(seg_masks)
    return np.repeat(seg_masks, 3, -1)

  path = tmp_path / "sheet.png"
  contact_sheet.draw(rows, range(5), path, reconstruct=reconstruct)
  assert [len(s) for s in seen] == [1, 2, 2]
  np.testing.assert_array_equal(seen[1], rows(1).fields.seg_masks)


def test_built_with_resized_pictures(capsys, tmp_path):
  path = layouts.write("jsonl", tmp_path)["path"]
  out = tmp_path / "packed"
  code, said, _ = _data(
    capsys,
    *("build", f"jsonl={path}", f"--out={out}", "--workers=1"),
    "--resize_pictures",
  )
  assert code == 0
  assert "packed train: 5 records" in said
  packed = open_source(
    DataConfig(source="array_record", path=str(out), **SIZES)
  )
  assert packed[0].load_image().shape == (64, 64, 3)
  # Another size is refused in training; whoever looks at it may have any.
  assert _data(capsys, "check", f"array_record={out}")[0] == 0
  sheet = f"--out={tmp_path / 'sheet.png'}"
  assert _data(capsys, "show", f"array_record={out}", sheet)[0] == 0
  code, _, err = _data(
    capsys,
    *("show", f"array_record={out}", sheet, "--force"),
    *("--config.data.pad_square=True", "--config.data.max_masks=2"),
  )
  assert code == 2
  assert "was built with --resize_pictures for data.image_side=64" in err
