"""Files that people really have: what is read, and what is refused and why.

A table of situations that users of other projects reported, in inputs of our
own. Whatever is read must be what was meant; the rest is named.
"""

import json
import os
import pickle
import re

import numpy as np
import pytest
from data import layouts

from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources import registry
from argenseg_jax.data.sources.registry import open_source

LEFT = layouts.LEFT


def _line(**changes):
  """A record of jsonl beside a.jpg and left.png."""
  chat = layouts.chat("<image>\nthe box", "<mask>")
  record = {"image": "a.jpg", "mask": "left.png", "conversations": chat}
  record |= changes
  return {k: v for k, v in record.items() if v is not ...}


def _ask(**changes):
  return _line(mask=..., conversations=...) | changes


LINES_REFUSED = [
  (_line(image=...), "1 <image> in its requests but 0"),
  (_line(image=..., images=["a.jpg"]), "unknown key 'images'.*'image'"),
  (_line(image=..., img="a.jpg"), "'img'.*'image'"),
  (_line(image=..., image_path="a.jpg"), "'image_path'.*'image'"),
  (_line(image=..., imagePath="a.jpg"), "'imagePath'.*'image'"),
  (_line(image=..., file_name="a.jpg"), "'file_name'.*'image'"),
  (_line(mask=..., masks=["left.png"]), "'masks'.*'mask'"),
  (_line(mask=..., segmentation=[[1, 2]]), "'segmentation'.*'mask'"),
  (_line(conversations=..., conversation=[]), "'conversations'"),
  (_line(image=["a.jpg", None]), "names a file by None"),
  (_line(image=" "), "names a file by ' '"),
  (_line(mask="a.jpg"), "a.jpg as image and as mask"),
  (_line(kind=""), "empty kind"),
  (_line(mask=[[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]), "not in shares of the image"),
  (
    _line(mask=[[1, 1, 9, 1, 9, 9]], width=60, height=40),
    "has 30x20 pixels, the annotations say 60x40",
  ),
  (_line(width=60, height=40), "the annotations say 60x40"),
  (_line(width=30, height="tall"), '"width" or "height" that is none'),
  (_line(widht=30), "'widht'.*'width'"),
  (_line(void="left.png"), "'void'.*'ignore'"),
  (_line(ignore=["left.png", "left.png"]), '2 "ignore" but 1 masks'),
  (_ask(question="Which?", options=["a", "b"], answer="A"), "'choices'"),
  (_ask(text="Is it?", label=1), "label 1, which could be a number or mean"),
  (_line(dataset=["a"]), "no text"),
  (_line(conversations=layouts.chat("<image>\na", " ")), "turn 2 is empty"),
  (
    _line(conversations=layouts.chat("<image>\na", "<mask>")[:1]),
    "end with an ans",
  ),
  (
    _line(conversations=[{"from": "user", "value": "a"}]),
    "turn 1 is from 'user'",
  ),
  (_line(kind="absent"), 'kind "absent", but its mask has an object'),
  (_ask(question="Which?"), 'without "answer"'),
  (_ask(question=7, answer="a"), "question 7, which is no text"),
  (_ask(question="Which?", anwser="a"), "'anwser'.*'answer'"),
  (_ask(question="Is it?", answer=True), "answer True, which is no text"),
  (_ask(question="Is it?", answer="maybe", kind="yes_no"), 'not "yes" or'),
  (_ask(question="Which?", answers=["a", None]), "answer None"),
  (_ask(question="Which?", answer="a", image=""), "names a file by ''"),
  (_ask(question="Which?", choices=["a", "b"], answer=2), "index of none"),
  (_ask(question="Which?", choices=["a", "b"], answer="c"), "is none of"),
  (_ask(question="Which?", choices=["B", "A"], answer="A"), "could be several"),
  (_ask(question="Which?", choices=["a", "a"], answer=0), "'a' twice"),
  (_ask(question="Which?", choices=["a"], answer=0), "1 choices; use 2 to"),
  ('{"image": "a.jpg", "image": "b.jpg"}', "the key 'image' twice"),
  ('{"image": "a.jpg", "x": NaN}', "it contains NaN"),
  (json.dumps(_line()).encode("utf-16"), "is UTF-16, not UTF-8"),
  ('{"text": "\N{LATIN SMALL LETTER E WITH ACUTE}"}'.encode("latin1"), "UTF-8"),
]


@pytest.fixture
def images(tmp_path):
  layouts.image(tmp_path / "a.jpg", 0)
  layouts.mask(tmp_path / "left.png", LEFT)
  return tmp_path


def _written(path, records, bom=b""):
  lines = [
    r if isinstance(r, bytes) else r.encode()
    for r in (
      r if isinstance(r, (str, bytes)) else json.dumps(r) for r in records
    )
  ]
  path.write_bytes(bom + b"\n".join(lines))
  return {"path": str(path), "source": "jsonl"}


def _fault(source_keys, index=0):
  """What is wrong with a record, at opening, reading or making its row."""
  try:
    rows = layouts.rows(**source_keys)
  except DataError as error:
    return str(error)
  return rows(index).error


def test_lines_that_are_refused(images):
  for record, said in LINES_REFUSED:
    keys = _written(images / "x.jsonl", [record])
    assert re.search(said, _fault(keys)), said


def test_null_is_absent_and_answers_are_read(images):
  nothing = {"kind": None, "answers": None, "choices": None, "mask": None}
  cases = [
    (_ask(text="Dog?", label="Yes.", **nothing), "yes_no", ("yes",), "Yes."),
    (_ask(text="Dog?", label="no ", **nothing), "yes_no", ("no",), "no"),
    (_ask(question="How many?", answer=5), "text", (), "5"),
    (_ask(question="Q", choices=["cat", "dog"], answer=1), "choice", (), "B"),
    (_ask(question="Q", choices=["cat", "dog"], answer="A"), "choice", (), "A"),
    (
      _ask(question="Q", choices=["cat", "dog"], answer="Dog"),
      "choice",
      (),
      "B",
    ),
    (
      _ask(question="Q", answers=[{"answer": "a"}, {"answer": "b"}]),
      *("vqa", ("a", "b"), "a"),
    ),
    (_line(img_width=64, category="cup", id=None), "referring", (), "<mask>"),
    (_line(width=30, height=20, weight=3), "referring", (), "<mask>"),
    (_line(ignore="left.png"), "referring", (), "<mask>"),
    (_ask(question="How many?", answer=1), "text", (), "1"),
  ]
  keys = _written(
    images / "x.jsonl", [record for record, *_ in cases], b"\xef\xbb\xbf"
  )
  rows = layouts.rows(**keys)
  for index, (_, kind, answers, answer) in enumerate(cases):
    assert not rows(index).error
    sample = rows.source[index]
    assert (sample.kind, sample.answers) == (kind, answers)
    assert sample.conversation[-1]["value"] == answer
  regions = [sample.load_ignore(0) for sample in rows.source if sample.ignores]
  np.testing.assert_array_equal(regions, [LEFT])


def test_marks_and_separators_are_no_part_of_texts(images):
  (images / "a.png").write_bytes((images / "left.png").read_bytes())
  (images / "left.png").unlink()
  said = "the red\N{LINE SEPARATOR}cup"
  (images / "a.txt").write_bytes(
    b"\xef\xbb\xbf" + f"{said}\r\n\r\n the mug \n".encode()
  )
  sample = open_source(DataConfig(str(images), source="folder"))[0]
  assert sample.expressions == (said, "the mug")
  (images / "a.txt").write_bytes("the mug".encode("utf-16"))
  with pytest.raises(DataError, match=r"a\.txt is UTF-16"):
    open_source(DataConfig(str(images), source="folder"))[0]


def test_a_folder_where_names_are_doubtful(images):
  for name in ("a.png", "b.png", "._a.jpg", "a.jpeg"):
    (images / name).write_bytes(b"x")
  source = open_source(DataConfig(str(images), source="folder"))
  assert len(source) == 2
  assert "2 files without an image" in source.notes[0]
  with pytest.raises(DataError, match="several images named 'a'"):
    source[0]


# ---- what a file does while it is open --------------------------------------


def test_a_file_that_changes_while_it_is_read_is_named(images):
  keys = _written(images / "x.jsonl", [_line()] * 50)
  source = open_source(DataConfig(**keys))
  assert source[49].images
  os.truncate(images / "x.jsonl", 10)
  with pytest.raises(DataError, match=r"x\.jsonl has changed since it was"):
    source[49]
  _written(images / "x.jsonl", [_line()] * 50)
  with pytest.raises(DataError, match=r"x\.jsonl has changed since it was"):
    pickle.loads(pickle.dumps(source))[0]


# ---- layouts ----------------------------------------------------------------


def test_an_unknown_layout_is_named_with_the_nearest():
  with pytest.raises(ConfigError, match=r"'refcoco'.*did you mean 'ref_coco'"):
    open_source(DataConfig("x", source="refcoco"))


@pytest.mark.parametrize("name", registry.LAYOUTS)
def test_every_layout_says_what_it_can_do(name):
  """A new layout is a file and a line of the table; this is its protocol."""
  module, _, kind = registry.LAYOUTS[name].partition(".")
  package = f"{registry.__package__}.{module}"
  source = getattr(__import__(package, fromlist=[kind]), kind)
  assert callable(source.open)
  assert isinstance(source.has_turns, bool)
  if name != "array_record":  # Known when it is opened.
    assert isinstance(source.has_options, bool)


def test_options_that_a_source_does_not_declare_are_no_secret(tmp_path):
  rows = layouts.rows(**layouts.write("ade20k", tmp_path))
  rows.source.has_options = False
  with pytest.raises(TypeError, match="Ade20kSource gives options"):
    rows(0)
