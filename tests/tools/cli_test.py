"""The command line: help, and one sentence with exit code 2 for bad input."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.tools import cli, predict, quickstart


def run(capsys, *argv):
  code = cli.main(list(argv))
  out = capsys.readouterr()
  return code, out.out, out.err


def test_help_lists_every_command(capsys):
  code, out, _ = run(capsys, "--help")
  assert code == 0
  for name in cli.COMMANDS:
    assert f"  {name} " in out


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["dance"], "unknown command 'dance'"),
    (["train", "--config=configs/none.py", "--workdir=x"], "none.py"),
    (["train", "--workdir=x"], "give a config"),
    (
      ["train", "--config=configs/tiny.py", "--config.data.path=x"],
      "give a work directory",
    ),
    (
      [
        "train",
        "--config=configs/tiny.py",
        "--workdir=x",
        "--config.mllm.trian.steps=3",
      ],
      "trian",
    ),
    (
      ["predict", "--checkpoint=absent", "--image=a.png", "--text=cup"],
      "a.png",
    ),
    (["eval", "--checkpoint=absent"], "absent does not exist"),
    (["quickstart", "--minutes=0"], "--minutes=0 must be above 0"),
    (["quickstart", "--minutes=nan"], "--minutes=nan must be above 0"),
    (["quickstart", "--minutes=inf"], "--minutes=inf must be above 0"),
    (["quickstart", "--seed=-1"], "'seed' is -1; use 0 to 2147483647"),
    (["quickstart", f"--seed={10**30}"], "use 0 to 2147483647"),
  ],
)
def test_bad_input_is_one_sentence(
  argv, message, capsys, tmp_path, monkeypatch, request
):
  configs = request.config.rootpath / "configs"
  argv = [a.replace("configs/", f"{configs}/") for a in argv]
  monkeypatch.chdir(tmp_path)
  code, _, err = run(capsys, *argv)
  assert code == 2
  assert message in err
  assert len(err.strip().splitlines()) == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_explains_every_flag(capsys, request, command):
  source = (request.config.rootpath / "tools" / f"{command}.py").read_text()
  defined = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source)
  _, out, _ = run(capsys, command, "--help")
  explained = re.findall(r"^  --(\w+)\S*\s+\w.{12}", out, re.MULTILINE)
  assert defined
  assert set(defined) <= set(explained)


def test_empty_data_set_is_named(capsys, tmp_path, request):
  data = tmp_path / "none.jsonl"
  data.write_text("")
  config = request.config.rootpath / "configs" / "own_masks.py"
  code, _, err = run(
    capsys,
    "train",
    f"--config={config}",
    f"--workdir={tmp_path / 'run'}",
    f"--config.data.path={data}",
  )
  assert code == 2
  assert "contains no records" in err


def test_unreadable_image_and_existing_output_are_named(capsys, tmp_path):
  broken = tmp_path / "broken.jpg"
  broken.write_bytes(b"\xff\xd8\xff no picture")
  out = tmp_path / "mask.png"
  args = ["predict", "--checkpoint=x", "--text=cup", f"--out={out}"]
  code, _, err = run(capsys, *args, f"--image={broken}")
  assert code == 2
  assert "broken.jpg" in err
  Image.fromarray(np.zeros((2, 2), np.uint8)).save(out)
  code, _, err = run(capsys, *args, f"--image={broken}")
  assert code == 2
  assert "exists" in err


def test_minutes_scale_every_length():
  full, half = (
    quickstart.scaled_config(0, 1.0),
    quickstart.scaled_config(0, 0.5),
  )
  assert half.mllm.train.steps == full.mllm.train.steps // 2
  assert half.vqvae.train.steps == full.vqvae.train.steps // 2
  assert half.data.warmup_steps == full.data.warmup_steps // 2


def test_summary_names_every_split(tmp_path):
  metrics = {"ciou": 0.5, "giou": 0.4, "pr@0.5": 0.3, "invalid": 2}
  results = {
    "splits": {"val": metrics, "testB": metrics},
    "tokenizer_ceiling": {"ciou": 0.9},
    "parameters": {"total": 1_000_000},
    "seconds": {"mllm": 60.0},
  }
  text = quickstart.summary(json.loads(json.dumps(results)), tmp_path)
  assert "testB" in text
  assert "cIoU 0.900" in text
  assert "1.00 M parameters, 1.0 minutes" in text


def test_flags_may_be_spelled_with_hyphens(monkeypatch):
  asked = []
  monkeypatch.setattr(predict, "main", lambda argv: asked.append(argv) or 0)
  given = ["--answer-prefix=a-b", "--num-scales", "2", "-x-y", "--a b-c", "--"]
  assert cli.main(["predict", *given]) == 0
  assert asked == [
    ["--answer_prefix=a-b", "--num_scales", "2", "-x-y", "--a b-c", "--"]
  ]
