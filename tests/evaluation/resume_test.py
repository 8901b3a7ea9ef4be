"""Interrupted evaluations: of the same data, each sample once."""

import json

import pytest

from argenseg_jax.config import ConfigError
from argenseg_jax.data.errors import DataError
from argenseg_jax.evaluation import records, resume

REPORT = {"what": "model", "fingerprints": {"val": "1", "testA": "2"}}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"fingerprints": {"val": "1", "testA": "3"}}, r"changed since \(testA\)"),
    ({"what": "tokenizer"}, "differs in 'what'"),
  ],
)
def test_another_evaluation_is_refused(change, message, tmp_path):
  with resume.claimed(tmp_path / "out", REPORT, "out"):
    pass
  with resume.claimed(tmp_path / "out", REPORT, "out"):  # The same goes on.
    pass
  with (
    pytest.raises(ConfigError, match=message),
    resume.claimed(tmp_path / "out", REPORT | change, "out"),
  ):
    pass


def test_two_evaluations_do_not_share_a_folder(tmp_path):
  with (
    resume.claimed(tmp_path, REPORT, "out"),
    pytest.raises(ConfigError, match="another evaluation writes to out"),
    resume.claimed(tmp_path, REPORT, "out"),
  ):
    pass


@pytest.mark.parametrize("text", ["{", "7", "[]", ""])
def test_a_damaged_claim_is_named(text, tmp_path):
  (tmp_path / resume.CLAIM).write_text(text)
  with (
    pytest.raises(ConfigError, match=r"eval\.json is damaged"),
    resume.claimed(tmp_path, REPORT, "out"),
  ):
    pass


def _line(sample, **more):
  answer = {"picture": "p", "text": "yes", "kind": "yes_no", "question": "?"}
  return json.dumps({"sample": sample, "answers": ["yes"]} | answer | more)


@pytest.mark.parametrize(
  "tail",
  [
    b"\x00\xff\xfe",
    b'{"sample": 6, "tex',
    b"null",
    b"[]",
    b"7",
    b"{}",
    b'{"sample": "6"}',
    b'{"sample": true, "answers": []}',
    b"[" * 100_000,
    b"\n\n",
    _line(5).encode(),  # A second time.
    _line(2).encode(),  # Out of order.
    _line(6).encode("utf-16"),
  ],
)
def test_a_damaged_tail_is_answered_again(tail, tmp_path):
  path = tmp_path / records.FILE
  whole = [_line(i) for i in range(6)]
  path.write_bytes("\n".join([*whole, ""]).encode() + tail)
  kept = resume.keep_whole_batches(path, 2)
  assert [r["sample"] for r in kept] == [0, 1, 2, 3]
  assert records.rescore(path)["questions"] == 4


def test_damage_in_the_middle_loses_what_follows(tmp_path):
  path = tmp_path / records.FILE
  lines = [_line(i) for i in range(8)]
  lines[5] = lines[5][:10]
  path.write_text("\n".join(lines))
  kept = resume.keep_whole_batches(path, 2)
  assert [r["sample"] for r in kept] == [0, 1, 2, 3]


def test_no_sample_is_counted_twice(tmp_path):
  path = tmp_path / records.FILE
  path.write_text("\n".join([_line(0), _line(1), _line(0)]))
  with pytest.raises(DataError, match=r":3 .*sample 0 stands in line 1"):
    records.rescore(path)
  path.write_text("\n".join([_line(0, dataset="a"), _line(0, dataset="b")]))
  assert records.rescore(path)["questions"] == 2
