"""`argenseg bench device` loses nothing, resumes, and prints a table."""

import json

import pytest

from argenseg_jax.tools import cli
from argenseg_jax.tools.bench import device


def lines_of(out):
  return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_part_runs_once(tmp_path, capsys):
  out = tmp_path / "results.jsonl"
  arguments = ["bench", "device", "--only=ceilings", f"--out={out}"]
  assert cli.main([*arguments, "--budget=120"]) == 0
  found = lines_of(out)
  assert found[-1]["finished"]
  assert {"TFLOP/s", "GB/s"} == {x["unit"] for x in found if "unit" in x}
  assert all(x["value"] > 0 for x in found if "value" in x)
  assert cli.main([*arguments, "--budget=120"]) == 0
  assert lines_of(out) == found
  capsys.readouterr()
  assert cli.main([*arguments, "--markdown"]) == 0
  assert "| ceilings | product of 512 | " in capsys.readouterr().out


def test_what_a_stopped_part_found_stays(tmp_path, monkeypatch):
  out = tmp_path / "results.jsonl"
  program = (
    'import sys, time; print(\'{"name": "a", "value": 2, "unit": "s"}\''
    ", flush=True); time.sleep(60)"
  )
  monkeypatch.setattr(device, "_COMMAND", ["-c", program])
  part = device.Part("sleeps", 2.0)
  monkeypatch.setitem(device.PARTS, "ceilings", part)
  assert device.run_parts(["ceilings"], out, budget=60, size="tiny") == [
    "ceilings"
  ]
  found = lines_of(out)
  assert found[0]["value"] == 2
  assert found[1]["error"] == "stopped after 2 s"
  # A line that a kill cut off is no reason to lose the others.
  out.write_text(out.read_text() + '{"part": "cei')
  assert device.read(out) == found
  assert "stopped after 2 s" in device.markdown(device.read(out))


def test_a_part_that_fails_says_why_and_is_tried_again(tmp_path, monkeypatch):
  out = tmp_path / "results.jsonl"
  monkeypatch.setattr(device, "_COMMAND", ["-c", "raise ValueError('no chip')"])
  for _ in range(2):
    assert device.run_parts(["loss"], out, budget=60, size="tiny") == ["loss"]
  assert [x["error"] for x in lines_of(out)] == ["ValueError: no chip"] * 2


def test_no_part_begins_without_time(tmp_path, capsys):
  out = tmp_path / "results.jsonl"
  assert device.run_parts(["loss"], out, budget=1, size="tiny") == []
  assert "rerun to resume" in capsys.readouterr().out
  assert not out.exists()


@pytest.mark.long
def test_all_parts_run_at_tiny_size(tmp_path):
  out = tmp_path / "results.jsonl"
  names = [name for name in device.PARTS if name != "peer"]
  assert device.run_parts(names, out, budget=1800, size="tiny") == []
  finished = [x["part"] for x in lines_of(out) if x.get("finished")]
  assert finished == names
  assert not [x for x in lines_of(out) if "failed" in x]


@pytest.mark.parametrize("argument", ["--budget=0", "--only=nothing"])
def test_bad_arguments_are_refused(argument, capsys):
  with pytest.raises(SystemExit, match="2"):
    device.main([argument])
  assert "budget must be positive" in (error := capsys.readouterr().err) or (
    "unknown part 'nothing'" in error
  )
