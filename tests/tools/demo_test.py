"""The demo: what it answers, whom it limits, and the page in a real browser."""

import asyncio
import concurrent.futures
import gc
import importlib.util
import json
import os
import pathlib
import shutil
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.config import ConfigError
from argenseg_jax.data.errors import DataError
from argenseg_jax.inference.segment import Prediction
from argenseg_jax.tools import demo
from argenseg_jax.tools.demo import answers
from argenseg_jax.tools.demo.answers import Answerer, Asked
from argenseg_jax.tools.demo.limits import RateLimit

CHROMIUM = shutil.which("chromium")
HAS_GRADIO = importlib.util.find_spec("gradio") is not None


@pytest.fixture(scope="module", autouse=True)
def _gradio_leaves_nothing():
  """It leaves sockets and loops open; other tests would be blamed for them."""
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)
    gc.collect()


class Model:
  """Answers as a predictor would: the left half, or nothing for "nothing"."""

  def __init__(self):
    self.calls, self.running = [], threading.Lock()

  def segment_batch(self, images, requests, *, template):
    assert self.running.acquire(blocking=False), "two calls at once"
    try:
      self.calls.append((list(requests), template))
      for request in requests:
        if "refuse" in request:
          raise DataError("the request is too long.")
      return [_prediction(*pair) for pair in zip(images, requests, strict=True)]
    finally:
      self.running.release()

  def chat(self, turns, *, image):
    pixels = np.zeros((4, 4, 3), np.uint8) if image is None else image
    return _prediction(pixels, f"turn {len(turns)}")


def _prediction(image, request) -> Prediction:
  height, width = image.shape[:2]
  there = "nothing" not in request
  masks = np.zeros((int(there), height, width), bool)
  masks[:, :, : width // 2] = True
  return Prediction(
    seg_masks=masks,
    text=f"{request}<mask>" if there else "There is no such thing.",
    confidences=np.full(int(there), np.log(0.5), np.float32),
    codes=np.zeros((int(there), 5), np.int32),
    _draw_strip=lambda: np.zeros((2, 4, 4, 3), np.uint8),
    _pad_square=False,
  )


@pytest.fixture
def photo(tmp_path):
  path = tmp_path / "photo.png"
  pixels = np.full((30, 40, 3), (250, 30, 80), np.uint8)
  Image.fromarray(pixels).save(path)
  return str(path)


@pytest.fixture
def model():
  return Model()


@pytest.fixture
def answerer(model):
  return Answerer(model, batch_size=4)


def test_questions_of_several_users_are_one_batch(answerer, model, photo):
  found = answerer([Asked(photo, "a\n\n b "), Asked(photo, "c")])
  assert model.calls == [(["a", "b", "c"], "")]
  assert [f.requests for f in found] == [["a", "b"], ["c"]]
  assert [len(f.predictions) for f in found] == [2, 1]


def test_a_faulty_question_costs_only_itself(answerer, photo, tmp_path):
  broken = tmp_path / "broken.png"
  broken.write_text("no image")
  found = answerer(
    [
      Asked(photo, "a"),
      Asked(str(broken), "a"),
      Asked(None, "a"),
      Asked(photo, " "),
      Asked(photo, "refuse"),
      Asked(photo, "x" * 501),
      Asked(photo, "\n".join("abcdefghi")),
    ]
  )
  assert [bool(f.fault) for f in found] == [False] + [True] * 6
  assert len(found[0].predictions) == 1
  assert "broken.png" in found[1].fault
  assert str(tmp_path) not in found[1].fault
  assert "add an image" in found[2].fault
  assert "too long" in found[4].fault
  assert all(answers.overlays(f, 0.5) == [] for f in found[1:])
  assert all(answers.files(f) == ([], []) for f in found[1:])


def test_places_and_words_are_asked_apart(answerer, model, photo):
  text, template = answers.place_request(photo, [(20, 15)])
  assert (text, template) == ("[[500, 500]]", "point")
  box = answers.place_request(photo, [(30, 30), (10, 0)])
  assert box == ("[[250, 0, 750, 1000]]", "box")
  with pytest.raises(DataError, match="no area"):
    answers.place_request(photo, [(3, 3), (3, 9)])
  answerer([Asked(photo, "a"), Asked(photo, text, template)])
  assert model.calls == [(["a"], ""), (["[[500, 500]]"], "point")]


def test_no_such_thing_is_said(answerer, photo):
  (found,) = answerer([Asked(photo, "nothing here\na")])
  report = answers.report(found)
  assert "no such thing" in report
  assert "a&lt;mask&gt;" in report
  assert "50.0% of the image, confidence 50% per code" in report
  masks, strips = answers.files(found)
  assert [os.path.basename(m) for m in masks] == [
    "mask_2.png",
    "masks_rle.json",
  ]
  assert len(strips) == 1
  records = json.loads(pathlib.Path(masks[-1]).read_text())
  assert [len(r["masks"]) for r in records] == [0, 1]
  assert np.asarray(Image.open(masks[0]))[:, :20].all()


def test_conversations(answerer, photo):
  turns = [{"from": "human", "value": "a"}]
  pixels, answer = answerer.converse(photo, turns)
  assert pixels.shape == (30, 40, 3)
  assert answer.text == "turn 1<mask>"
  assert answerer.converse(None, turns)[0] is None
  with pytest.raises(DataError, match="at most 500"):
    answerer.converse(None, [{"from": "human", "value": "x" * 501}])


def test_who_asks_too_often_waits():
  now, reached = [0.0], []

  async def app(scope, receive, send):
    reached.append(scope["path"])

  limit = RateLimit(app, per_minute=2, clock=lambda: now[0])

  def call(path="/gradio_api/call/segment", address="10.0.0.1", method="POST"):
    sent = []

    async def send(message):
      sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    asyncio.run(limit(scope | {"client": (address, 1)}, None, send))
    return sent[0]["status"] if sent else 200

  assert [call(), call(), call()] == [200, 200, 429]
  assert call(address="10.0.0.2") == 200
  assert call(method="GET") == 200
  assert call(path="/config") == 200
  now[0] = 60.0
  assert call() == 200
  assert len(reached) == 6


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--batch_size=0"], "--batch_size is 0"),
    (["--port=70000"], "--port is 70000"),
    (["--per_minute=0"], "--per_minute is 0"),
    (["--examples=missing"], "missing is no folder"),
  ],
)
def test_flags_are_checked_before_the_model_is_opened(flags, sentence):
  with pytest.raises(ConfigError, match=sentence):
    demo.main(["--checkpoint=missing", *flags])


@pytest.mark.skipif(HAS_GRADIO, reason="gradio is installed")
def test_a_missing_extra_is_named():
  with pytest.raises(ConfigError, match=r"argenseg_jax\[demo\]"):
    demo.main(["--checkpoint=missing"])


@pytest.mark.filterwarnings("ignore")
def test_programs_see_one_endpoint_and_half_a_click_is_no_error(answerer):
  gradio = pytest.importorskip("gradio", reason="needs the extra [demo]")
  from argenseg_jax.tools.demo import page

  named = page.build(answerer, []).get_api_info()["named_endpoints"]
  assert list(named) == ["/segment"]
  page._require_place(("[[500, 500]]", "point"))
  with pytest.raises(gradio.Error) as caught:
    page._require_place(None)
  assert not caught.value.visible


@pytest.fixture
def address(answerer):
  pytest.importorskip("gradio", reason="needs the extra [demo]")
  from argenseg_jax.tools.demo import page

  built = page.build(answerer, [])
  yield page.serve(
    built,
    host="127.0.0.1",
    port=0,
    share=False,
    per_minute=1000,
    max_megabytes=1,
    block=False,
  )
  built.close()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_programs_can_use_it(address, photo, tmp_path, model):
  from gradio_client import Client, handle_file

  clients = [Client(address, verbose=False) for _ in range(2)]

  def ask(client, request, image=photo):
    return client.predict(handle_file(image), request, 0.5, api_name="/segment")

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    both = list(pool.map(ask, clients, ["a", "b\nnothing"]))
  assert [len(answer[0]) for answer in both] == [1, 2]
  assert "no such thing" in both[1][1]
  rle = json.loads(pathlib.Path(both[0][3][-1]).read_text())
  assert rle[0]["request"] == "a"
  broken = tmp_path / "broken.png"
  broken.write_text("no image")
  assert "Not answered" in ask(clients[0], "a", str(broken))[1]
  large = tmp_path / "large.png"
  large.write_bytes(b"x" * (2 << 20))
  with pytest.raises(Exception, match=r"(?i)size|large|413|exceed"):
    ask(clients[0], "a", str(large))


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.filterwarnings("ignore")
def test_the_page_in_a_browser(address, photo, tmp_path, model):
  sync_api = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright"
  )
  shots = os.environ.get("ARGENSEG_DEMO_SHOTS") or str(tmp_path)
  with sync_api.sync_playwright() as driver:
    browser = driver.chromium.launch(
      executable_path=CHROMIUM,
      args=["--no-sandbox", "--disable-background-networking"],
    )
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    foreign = []
    page.on(
      "request",
      lambda r: foreign.append(r.url) if address not in r.url else None,
    )
    page.goto(address)
    said = page.locator("#answer")
    upload = page.locator("#image input[type=file]").first
    upload.set_input_files(photo)
    page.locator("#image img").first.wait_for()
    page.locator("#requests textarea").fill("the red thing\nnothing")
    page.locator("#segment").click()
    sync_api.expect(said).to_contain_text("50.0% of the image", timeout=30000)
    sync_api.expect(said).to_contain_text("There is no such thing.")
    page.locator("#masks img").first.wait_for()
    page.screenshot(path=f"{shots}/words.png")
    # Clicks: the middle of the image, then a box from two corners.
    image = page.locator("#image img").first
    page.get_by_label("click a point").check()
    image.click()
    sync_api.expect(said).to_contain_text("[[5", timeout=30000)
    page.get_by_label("click two corners").check()
    box = image.bounding_box()
    image.click(position={"x": box["width"] * 0.3, "y": box["height"] * 0.3})
    sync_api.expect(said).to_contain_text("opposite corner", timeout=30000)
    image.click(position={"x": box["width"] * 0.7, "y": box["height"] * 0.7})
    sync_api.expect(said).to_contain_text("of the image", timeout=30000)
    assert model.calls[-1][1] == "box"
    page.screenshot(path=f"{shots}/box.png")
    page.get_by_role("tab", name="Converse").click()
    page.locator("#message textarea, #message input").first.fill("hello")
    page.keyboard.press("Enter")
    talk = page.locator("#conversation")
    sync_api.expect(talk).to_contain_text("turn 1", timeout=30000)
    page.screenshot(path=f"{shots}/converse.png")
    browser.close()
  assert not [url for url in foreign if url.startswith("http")]
