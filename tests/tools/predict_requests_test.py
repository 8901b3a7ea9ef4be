"""Requests of files and of stdin: each is answered, or costs only itself."""

import io
import json
import os

import pytest
from fake_predictor import predict, records

from argenseg_jax.data.errors import DataError


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
  assert "1 of 3 requests could not be answered" in err
  found = records(folder / "out/predictions.jsonl")
  assert [record["id"] for record in found] == ["one", "b"]
  assert fake.batches[1][2]["answer_prefix"] == "the hat"


BAD_LINES = (
  '{"image": "in/a.png", "text": "cup", "id": ".."}',
  '{"image": "in/a.png", "text": "cup", "id": "."}',
  '{"image": "in/a.png", "text": "cup", "id": ""}',
  '{"image": "in/a.png", "text": "cup", "id": "x/y"}',
  '{"image": "in/a.png", "text": "cup", "id": "a\\\\b"}',
  '{"image": "in/a.png", "text": "cup", "id": "a\\u0000"}',
  '{"image": "in/a.png", "text": "cup", "id": "a\\n"}',
  '{"image": "in/a.png", "text": "cup", "id": "\\ud800"}',
  '{"image": "in/a.png", "text": "cup", "id": "%s"}' % ("é" * 150),
  '{"image": "in/a.png", "text": "cup", "id": ["a"]}',
  '{"image": "in/a.png", "text": "cup", "id": true}',
  '{"image": "in/a.png", "text": "cup", "answer_prefix": 3}',
  '{"image": "in/a.png", "text": "cup", "answer_prefx": "a"}',
  '{"image": "in/a.png", "txt": "cup"}',
  '{"image": "in/a.png", "text": ["cup"]}',
  '{"image": "in/a.png", "text": null}',
  '{"image": "", "text": "cup"}',
  '{"image": "in/a\\u0000.png", "text": "cup"}',
  '{"image": "in/none.png", "text": "cup"}',
  '{"image": "in/sub/broken.jpg", "text": "cup"}',
  '{"image": "in", "text": "cup"}',
  '{"image": "in/a.png", "text": "bad words"}',
  "[" * 100_000,
  "7",
  "nonsense",
)


@pytest.mark.parametrize("number", range(len(BAD_LINES)))
def test_a_bad_request_costs_only_itself(
  number, fake, folder, capsys, monkeypatch
):
  good = json.dumps({"image": "in/a.png", "text": "cup"})
  answer = fake.answer

  def refuse_some(image, text):
    if text == "bad words":
      raise DataError("too many words.")
    return answer(image, text)

  monkeypatch.setattr(fake, "answer", refuse_some)
  path = folder / "requests.jsonl"
  path.write_text("\n".join((good, BAD_LINES[number], good)))
  assert predict(f"--requests={path}", "--out=out") == 2
  err = capsys.readouterr().err
  assert "1 of 3 requests could not be answered" in err
  assert "request 2" in err or "cannot " in err  # An image names itself.
  found = records(folder / "out/predictions.jsonl")
  assert [record["image"] for record in found] == ["in/a.png"] * 2
  assert len({record["id"] for record in found}) == 2


def test_lines_end_with_a_line_feed_only(fake, folder):
  path = folder / "requests.jsonl"
  text = "red\u2028square\u0085\x1c\x0b"
  line = json.dumps({"image": "in/a.png", "text": text}, ensure_ascii=False)
  path.write_bytes(("\ufeff" + line + "\r\n\r\n" + line).encode())
  assert predict(f"--requests={path}", "--out=out", "--write", "rle") == 0
  found = records(folder / "out/predictions.jsonl")
  assert [record["request"] for record in found] == [text] * 2


def test_requests_of_a_pipe_or_a_device_are_refused(fake, folder, capsys):
  os.mkfifo(folder / "pipe")
  for path in ("pipe", "/dev/zero", "in"):
    assert predict(f"--requests={path}", "--out=out") == 2
    assert f"--requests {path}: cannot read" in capsys.readouterr().err
  (folder / "gbk.jsonl").write_bytes('{"text": "红"}'.encode("gbk"))
  assert predict("--requests=gbk.jsonl", "--out=out") == 2
  assert "gbk.jsonl: it is not UTF-8 text" in capsys.readouterr().err
