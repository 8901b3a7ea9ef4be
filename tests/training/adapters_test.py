"""Adapters from a released-style folder to a fine-tuned model and back.

Only the commands of docs/finetuning.md are used, at a tiny size.
"""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released_folder

from argenseg_jax import checkpoint
from argenseg_jax.checkpoint import CheckpointError
from argenseg_jax.configs import adapters as adapters_config
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import lora
from argenseg_jax.tools import cli
from argenseg_jax.torch_weights import hf_config, tensors

pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.long

FLAGS = (
  f"--config={adapters_config.__file__}",
  "--config.lora.rank=2",
  "--config.lora.base=float32",
  "--config.data.source=jsonl",
  "--config.data.sequence_length=256",
  "--config.data.image_side=28",
  "--config.data.mask_side=8",
  "--config.data.mask_intermediate_side=0",
  "--config.mllm.train.steps=4",
  "--config.mllm.train.save_every=2",
  "--config.mllm.train.log_every=1",
  "--config.mllm.train.compute_dtype=float32",
  "--config.mllm.optimizer.warmup_steps=1",
  "--config.mllm.optimizer.learning_rate=1e-2",
  "--config.mllm.optimizer.eps=1e-4",
  "--config.eval.max_samples=2",
  "--config.eval.max_text=4",
  "--config.eval.batch_size=2",
)
EIGHT = (
  "--config.mesh.data=2",
  "--config.mesh.fsdp=2",
  "--config.mesh.tensor=2",
)


@pytest.fixture(scope="module", autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


def _train(places, workdir, *more: str) -> int:
  return cli.main(
    [
      "train",
      *FLAGS,
      f"--config.init_from={places.base}",
      f"--config.data.path={places.data}",
      f"--workdir={workdir}",
      *more,
    ]
  )


@dataclasses.dataclass(frozen=True)
class Places:
  folder: pathlib.Path  # As released.
  config: ModelConfig
  base: pathlib.Path  # Imported.
  data: pathlib.Path
  run: pathlib.Path  # Trained on eight devices.


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
  """import, then train."""
  root = tmp_path_factory.mktemp("finetuning")
  config = released_folder.write(root / "released")
  base = root / "base"
  argv = ["import", "--from", str(root / "released"), "--to", str(base)]
  assert cli.main(argv) == 0
  found = Places(
    root / "released",
    config,
    base,
    released_folder.annotate(root / "data"),
    root / "run",
  )
  assert _train(found, found.run, *EIGHT) == 0
  return found


def _losses(run: pathlib.Path) -> dict[int, float]:
  lines = (run / "mllm/metrics.jsonl").read_text().splitlines()
  values = [json.loads(line) for line in lines]
  return {v["step"]: v["loss"] for v in values if "loss" in v}


def _stored(path: pathlib.Path) -> dict[str, np.ndarray]:
  return checkpoint.read_variables(path)


def test_a_checkpoint_holds_adapters_only(places):
  stored = _stored(places.run / "mllm")
  assert stored
  assert all(name.endswith(("lora_a", "lora_b")) for name in stored)
  assert any(np.abs(v).max() > 0 for n, v in stored.items() if "lora_b" in n)
  found = checkpoint.describe(places.run / "mllm")
  assert found.adapters is not None
  assert found.adapters.base_path.startswith(str(places.base))
  losses = _losses(places.run)
  assert losses[4] < losses[1]


def _train_on_one_device(places, workdir, *more: str) -> None:
  one = ("--config.mesh.data=1", "--config.mesh.fsdp=1")
  with pytest.MonkeyPatch.context() as patch:
    device = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: device)
    assert _train(places, workdir, *one, *more) == 0


@pytest.mark.parametrize(
  ("more", "rtol"),
  [
    (
      (
        "--config.lora.base=int8",
        "--config.mllm.train.compute_dtype=bfloat16",
      ),
      1e-2,
    ),
    (
      (
        "--config.mllm.train.accumulate_steps=2",
        "--config.mllm.optimizer.ema_decay=0.5",
      ),
      1e-4,
    ),
    (("--config.data.pack=2", "--config.data.sequence_length=512"), 1e-4),
  ],
  ids=["int8", "accumulated and averaged", "packed"],
)
def test_one_device_and_eight_train_the_same_with(
  more, rtol, places, tmp_path, capsys
):
  assert _train(places, tmp_path / "eight", *EIGHT, *more) == 0
  _train_on_one_device(places, tmp_path / "one", *more)
  losses = _losses(tmp_path / "eight")
  assert losses[4] < losses[1]
  np.testing.assert_allclose(
    list(_losses(tmp_path / "one").values()), list(losses.values()), rtol=rtol
  )
  argv = ["--image", str(places.data.parent / "1.jpg"), "--text=box 1"]
  argv += ["--checkpoint", str(tmp_path / "eight/mllm")]
  argv += ["--answer_prefix", "Sure:", "--out", str(tmp_path / "mask.png")]
  assert cli.main(["predict", *argv]) == 0, capsys.readouterr().err
  _resume(places, tmp_path / "eight", tmp_path / "again", *more)


def _resume(places, run, again, *more: str) -> None:
  """Without its last checkpoint a run takes that step again, to the bit."""
  shutil.copytree(run, again)
  shutil.rmtree(again / "mllm/checkpoints/4")
  for name in ("results.json", "mllm/results.json"):
    (again / name).unlink()
  assert _train(places, again, *EIGHT, *more) == 0
  wanted = _stored(run / "mllm")
  for name, value in _stored(again / "mllm").items():
    np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def test_one_device_trains_the_same_and_resumes(places, tmp_path):
  _train_on_one_device(places, tmp_path / "one")
  np.testing.assert_allclose(
    list(_losses(tmp_path / "one").values()),
    list(_losses(places.run).values()),
    rtol=1e-4,
  )
  wanted = _stored(places.run / "mllm")
  for name, value in _stored(tmp_path / "one/mllm").items():
    np.testing.assert_allclose(value, wanted[name], atol=2e-3, err_msg=name)
  _resume(places, places.run, tmp_path / "again")


def test_predict_and_eval_take_adapters(places, tmp_path, capsys):
  image = str(places.data.parent / "1.jpg")
  run = str(places.run / "mllm")
  shown = {}
  for name, options in {
    "base": ["--checkpoint", str(places.base)],
    "together": ["--checkpoint", str(places.base), "--adapters", run],
    "alone": ["--checkpoint", run],
  }.items():
    out = tmp_path / f"{name}.png"
    argv = ["predict", *options, "--image", image, "--text", "box 1"]
    argv += ["--answer_prefix", "Sure:", "--out", str(out)]
    assert cli.main(argv) == 0, capsys.readouterr().err
    shown[name] = out.read_bytes()
  assert shown["together"] == shown["alone"]
  argv = ["eval", "--checkpoint", str(places.base), "--adapters", run]
  argv += ["--data", f"jsonl={places.data}", "--out", str(tmp_path / "eval")]
  assert cli.main(argv) == 0, capsys.readouterr().err
  assert (tmp_path / "eval").is_dir()


# PEFT looks for a config of transformers in the base, a checkpoint of ours.
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_adapters_go_to_peft_and_back(places, tmp_path, capsys):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  transformers = pytest.importorskip("transformers")
  run, out = str(places.run / "mllm"), tmp_path / "peft"
  argv = ["export", "--from", run, "--to", str(out), "--part", "adapters"]
  assert cli.main(argv) == 0, capsys.readouterr().err

  class Whole(torch.nn.Module):
    """Where the authors' model has its language model."""

    def __init__(self, folder):
      super().__init__()
      values = hf_config.read(folder)["llm_config"]
      values = {
        k: v
        for k, v in values.items()
        if k not in ("architectures", "model_type")
      }
      self.language_model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**values, attn_implementation="eager")
      )
      source = tensors.SafetensorsFolder(folder)
      prefix = "language_model."
      self.language_model.load_state_dict(
        {
          n.removeprefix(prefix): torch.tensor(source.read(n))
          for n in source.tensors
          if n.startswith(prefix)
        }
      )

  tokens = np.random.default_rng(0).integers(3, 400, (2, 9))

  def theirs(model):
    with torch.no_grad():
      return model.language_model(torch.tensor(tokens)).logits.numpy()

  plain = theirs(Whole(places.folder).eval())
  tuned = peft.PeftModel.from_pretrained(Whole(places.folder), out).eval()
  wanted = theirs(tuned.base_model.model)
  assert np.abs(wanted - plain).max() > 1e-3

  def ours(model):
    hidden, _ = model.llm(
      model.llm.embed(jnp.asarray(tokens, jnp.int32)),
      positions=jnp.broadcast_to(jnp.arange(9), (2, 9)),
      segment_ids=jnp.ones((2, 9), jnp.int32),
    )
    return np.asarray(hidden @ model.llm.head.T)

  found = ours(checkpoint.load(run).model)
  np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())

  # Merged, as a whole folder of the authors.
  argv = ["export", "--from", run, "--to", str(tmp_path / "merged"), "--merge"]
  assert cli.main(argv) == 0, capsys.readouterr().err
  merged = theirs(Whole(tmp_path / "merged").eval())
  np.testing.assert_allclose(merged, wanted, atol=1e-4 * np.abs(wanted).max())
  for name in ("tokenizer.model", "tokenization_internlm2.py"):
    assert (tmp_path / "merged" / name).is_file()
  assert cli.main(["export", "--from", run, "--to", str(tmp_path / "x")]) == 2
  assert "add --merge" in capsys.readouterr().err

  # What PEFT saves comes back.
  tuned.save_pretrained(tmp_path / "theirs")
  argv = ["import", "--from", str(tmp_path / "theirs")]
  argv += ["--to", str(tmp_path / "back"), "--base", str(places.base)]
  assert cli.main(argv) == 0, capsys.readouterr().err
  wanted = _stored(places.run / "mllm")
  back = _stored(tmp_path / "back")
  assert back.keys() == wanted.keys()
  for name, value in back.items():
    np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def test_what_does_not_fit_is_said_in_a_sentence(places, tmp_path, capsys):
  def refused(argv, message):
    capsys.readouterr()
    try:
      code = cli.main(list(map(str, argv)))
    except SystemExit as ended:  # As argparse refuses arguments.
      code = ended.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err)

  run, other = places.run / "mllm", tmp_path / "other"
  image = places.data.parent / "1.jpg"
  shutil.copytree(places.folder, tmp_path / "changed")
  path = sorted((tmp_path / "changed").glob("*.safetensors"))[0]
  content = bytearray(path.read_bytes())
  content[-2] ^= 1
  path.write_bytes(bytes(content))
  argv = ["import", "--from", str(tmp_path / "changed"), "--to", str(other)]
  assert cli.main(argv) == 0
  ask = ["--image", image, "--text", "x", "--out", tmp_path / "x.png"]
  predict = ["predict", "--checkpoint", other, "--adapters", run, *ask]
  refused(predict, "another base")
  whole = ["predict", "--checkpoint", places.base, "--adapters", other, *ask]
  refused(whole, "whole model, not adapters")
  with pytest.raises(CheckpointError, match="holds no adapters"):
    checkpoint.load_adapters(other, mesh=None)
  # The same work directory on another base.
  again = tmp_path / "again"
  shutil.copytree(places.run, again)
  config = json.loads((again / "config.json").read_text())
  config["init_from"] = str(other)
  (again / "config.json").write_text(json.dumps(config))
  for name in ("results.json", "mllm/results.json"):
    (again / name).unlink()
  capsys.readouterr()
  assert _train(dataclasses.replace(places, base=other), again, *EIGHT) == 2
  assert "another base" in capsys.readouterr().err

  # PEFT's folders.
  good = tmp_path / "peft"
  argv = ["export", "--from", str(run), "--to", str(good)]
  assert cli.main([*argv, "--part", "adapters"]) == 0
  values = json.loads((good / "adapter_config.json").read_text())
  source = tensors.SafetensorsFile(good / "adapter_model.safetensors")
  names = list(source.tensors)
  for changes, kept, message in (
    ({}, names[1:], f"lacks tensor '{re.escape(names[0])}'"),
    ({"r": 3}, names, "gives it rank 3"),
    ({"use_dora": True}, names, "use_dora"),
    ({"peft_type": "IA3"}, names, "does not describe LoRA"),
  ):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text(json.dumps(values | changes))
    tensors.write_file(bad / "adapter_model.safetensors", source, kept)
    argv = ["import", "--from", bad, "--to", tmp_path / "never"]
    refused([*argv, "--base", places.base], message)
    refused(argv, "add --base")
    assert not (tmp_path / "never").exists()
    shutil.rmtree(bad)


def test_fresh_adapters_give_the_answers_of_the_base(places):
  found = checkpoint.describe(places.run / "mllm")
  assert found.adapters is not None
  loaded = checkpoint.load(places.base)
  tokens = jnp.arange(3, 12)[None]

  def outputs():
    hidden, _ = loaded.model.llm(
      loaded.model.llm.embed(tokens),
      positions=jnp.arange(9)[None],
      segment_ids=jnp.ones((1, 9), jnp.int32),
    )
    return np.asarray(hidden)

  wanted = outputs()
  lora.adapt(loaded.model, found.adapters.lora)
  np.testing.assert_array_equal(outputs(), wanted)
