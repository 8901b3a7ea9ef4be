import hashlib
import json

import cv2
import numpy as np
import pytest

from argenseg_jax.data import signatures
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.ref_shapes import builder, expressions, requests, scenes
from argenseg_jax.data.ref_shapes.expressions import Beside, Look, Outermost


def _thing(shape, color, size, x, y):
  return scenes.Thing(shape, color, size, x, y, scenes.SIZES[size][0], 0.0)


def _scene(*things):
  grays = (scenes.GROUND_COLORS[0], scenes.GROUND_COLORS[1])
  return scenes.Scene(things, "plain", grays, 0)


SCENE = _scene(
  _thing("circle", "red", "small", 0.2, 0.2),
  _thing("square", "red", "large", 0.5, 0.5),
  _thing("square", "blue", "small", 0.8, 0.52),
)


@pytest.mark.parametrize(
  ("query", "meant"),
  [
    (Look("circle"), 0),
    (Look(None, "blue"), 2),
    (Look(None, "red"), None),  # Two of them.
    (Look("star"), None),
    (Look("square", "red"), 1),
    (Look("square", None, "large"), 1),
    (Outermost(Look(), "left"), 0),
    (Outermost(Look("square"), "left"), 1),
    (Outermost(Look("square"), "below"), None),  # Too close to tell.
    (Beside(Look("square"), "right", Look(None, "blue")), None),
    (Beside(Look("square"), "left", Look(None, "blue")), 1),
    (Beside(Look(None, "red"), "above", Look("square", "blue")), None),
    (Beside(Look("square"), "left", Look("circle")), None),
  ],
)
def test_resolve_finds_what_a_reader_would(query, meant):
  assert expressions.resolve(SCENE, query) == meant


def test_wordings():
  rng = np.random.default_rng(0)
  look = Look("square", "red", "small")
  query = Beside(look, "left", Look("circle"))
  said = {expressions.phrase(rng, query) for _ in range(50)}
  assert said == {
    "the small red square left of the circle",
    "the small red square to the left of the circle",
  }
  said = {expressions.phrase(rng, Outermost(Look(), "left")) for _ in range(50)}
  assert said == {"the leftmost shape"}


def test_queries_of_generated_scenes_mean_one_shape():
  rng = np.random.default_rng(7)
  counts = {Look: 0, Beside: 0, Outermost: 0}
  for split, plan in requests.SPLITS.items():
    for i in range(60):
      scene = scenes.make_scene(
        np.random.default_rng((plan.number, i)), plan.style
      )
      for target in range(len(scene.things)):
        looks = expressions.attribute_looks(scene, target)
        places = expressions.relation_queries(scene, target)
        for query in (*looks, *places):
          counts[type(query)] += 1
          assert expressions.find(scene, query) == {target}, (split, i, query)
        for query in places:
          assert len(expressions.find(scene, query.what)) > 1
      absent = expressions.absent_look(rng, scene)
      assert not expressions.find(scene, absent)
  assert min(counts.values()) > 150


def test_drawn_masks_cover_the_shapes_color():
  for i in range(40):
    scene, drawing = scenes.draw_scene((3, i), scenes.Style((3,)), 96)
    assert not (drawing.visible.sum(0) > 1).any()
    for thing, seg_mask in zip(scene.things, drawing.visible, strict=True):
      inside = cv2.erode(seg_mask.astype(np.uint8), np.ones((3, 3)))
      colors = drawing.image[inside > 0].astype(np.float32)
      assert len(colors) > 20
      off = np.abs(colors - np.array(scenes.COLORS[thing.color]))
      assert off.max() < 16
      ys, xs = np.nonzero(seg_mask)
      assert abs(xs.mean() / 96 - thing.x) < thing.radius
      assert abs(ys.mean() / 96 - thing.y) < thing.radius


def test_splits_ask_for_what_they_promise():
  kinds = {}
  for split in requests.SPLITS:
    records = requests.iterate_requests(split, 200, seed=0, image_side=32)
    records = list(records)
    assert len(records) == 200
    kinds[split] = {
      k: sum(r["kind"] == k for r in records) / 200 for k in requests.KINDS
    }
    for record in records:
      assert 1 <= len(record["expressions"]) <= 3
      assert len(set(record["expressions"])) == len(record["expressions"])
      if record["kind"] == "attribute":
        words = {w for e in record["expressions"] for w in e.split()}
        words -= {"the", "one", "shape", "that", "is"}
        assert words <= set(record["description"].split())
      pixels = cv2.imdecode(
        np.frombuffer(record["seg_mask"], np.uint8), cv2.IMREAD_UNCHANGED
      )
      assert set(np.unique(pixels)) <= {0, 255}
      assert pixels.any() == (record["kind"] != "absent")
  assert kinds["testA"]["attribute"] == 1
  assert kinds["testB"]["relation"] == 1
  assert kinds["val"]["relation"] == 0
  assert 0.02 < kinds["val"]["absent"] < 0.15
  assert 0.5 < kinds["train"]["attribute"] < 0.75
  assert 0.08 < kinds["train"]["absent"] < 0.25
  assert 0.1 < kinds["train"]["relation"] < 0.35


def _digests(folder):
  return {
    f.name: hashlib.sha256(f.read_bytes()).hexdigest()
    for f in folder.iterdir()
    if "array_record" in f.name
  }


def test_the_same_seed_gives_the_same_bytes(tmp_path):
  small = {"num_train": 60, "num_eval": 12, "image_side": 32}
  seen = []
  first = builder.prepare(
    tmp_path / "a", **small, on_progress=lambda *at: seen.append(at)
  )
  again = builder.prepare(tmp_path / "b", **small)
  other = builder.prepare(tmp_path / "c", **small, seed=1)
  assert _digests(first) == _digests(again) != _digests(other)
  assert len(_digests(first)) == len(requests.SPLITS)
  assert seen[-1] == (106, 106)  # 60, a sixth of it, three times 12.


def test_processes_do_not_change_the_records(monkeypatch):
  monkeypatch.setattr(requests, "_WORTH_PROCESSES", 0)
  draw = {"seed": 5, "image_side": 32}
  one = list(requests.iterate_requests("train", 300, **draw))
  two = list(requests.iterate_requests("train", 300, **draw, workers=2))
  assert one == two


def test_a_finished_folder_is_found_and_another_one_refused(tmp_path):
  small = {"num_train": 12, "num_eval": 6, "image_side": 32}
  folder = builder.prepare(tmp_path, **small)
  before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
  assert builder.prepare(tmp_path, **small) == folder
  with pytest.raises(
    DataError, match=r"another image_side, seed, or it is damaged"
  ):
    builder.prepare(tmp_path, num_train=12, num_eval=6, seed=3, image_side=64)
  assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_what_a_killed_build_left_is_removed(tmp_path):
  version = str(builder.RefShapes.VERSION)
  left = tmp_path / "ref_shapes" / f"incomplete.ABC123_{version}"  # TFDS's.
  left.mkdir(parents=True)
  builder.prepare(tmp_path, num_train=12, num_eval=6, image_side=32)
  assert not left.exists()


def test_a_data_set_with_a_flipped_bit_is_named(tmp_path):
  small = dict(num_train=12, num_eval=6, image_side=32)
  folder = builder.prepare(tmp_path, **small)
  shard = max(folder.iterdir(), key=lambda path: path.stat().st_size)
  whole = shard.read_bytes()
  flipped = bytearray(whole)
  flipped[len(flipped) // 2] ^= 4
  shard.write_bytes(flipped)
  with pytest.raises(DataError, match=f"{shard.name} has changed since it was"):
    builder.prepare(tmp_path, **small)
  shard.write_bytes(whole)
  (folder / signatures.NAME).write_text("")  # Cut off by a kill.
  assert builder.prepare(tmp_path, **small) == folder
  assert len(json.loads((folder / signatures.NAME).read_text())) > 5
  (folder / builder.PARAMETERS).write_text("")
  with pytest.raises(DataError, match="or it is damaged"):
    builder.prepare(tmp_path, **small)
