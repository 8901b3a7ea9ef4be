"""The small runs that tests train, stop, kill and starve."""

import json
import pathlib
import socket
import sys

from argenseg_jax.config import RunConfig
from argenseg_jax.config_parsing import run_config
from argenseg_jax.configs import tiny
from argenseg_jax.data.ref_shapes import builder
from argenseg_jax.data.text import TextTokenizer

ROOT = pathlib.Path(__file__).parents[1]
OVERRIDES = (
  "vision.width=16",
  "vision.stem_blocks=1",
  "llm.width=16",
  "llm.num_layers=1",
  "llm.head_dim=8",
  "llm.mlp_width=16",
  "vqvae.width=8",
  "vqvae.scales=(1, 4)",
  "vqvae.patch_side=16",
  "vqvae.width_multipliers=(1,)",
  "vqvae.num_codes=16",
)
VOCAB = TextTokenizer().token_ids.first_code + 16
COMMAND = [
  *(sys.executable, "-m", "argenseg_jax.tools.cli", "train"),
  f"--config={ROOT / 'configs' / 'tiny.py'}",
  f"--config.model.overrides={(*OVERRIDES, f'llm.vocab_size={VOCAB}')!r}",
  "--config.tasks=('mllm',)",
  "--config.data.warmup_steps=0",
  "--config.mllm.train.steps=5",
  "--config.mllm.train.global_batch_size=8",
  "--config.mllm.train.log_every=1",
  "--config.mllm.train.eval_every=0",
]


def free_address() -> str:
  """Of this machine, for process 0 of a run of several."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def both_tasks(folder: pathlib.Path) -> RunConfig:
  """Six steps of each task on eight devices, on data written to `folder`."""
  path = builder.prepare(folder, num_train=48, num_eval=8, seed=0)
  c = tiny.get_config()
  c.data.path = str(path)
  c.data.warmup_steps = 2
  c.data.sequence_length = 128
  c.mesh.data, c.mesh.fsdp = 4, 2
  c.model.overrides = (*OVERRIDES, f"llm.vocab_size={VOCAB}")
  for stage in (c.vqvae, c.mllm):
    stage.train.steps = 6
    stage.train.global_batch_size = 8
    stage.train.log_every = 1
    stage.train.save_every = 3
    stage.train.keep = 3
    stage.optimizer.warmup_steps = 1
  c.mllm.train.eval_every = 0
  c.tokenizer_training.warm_start_steps = 2
  c.tokenizer_training.kmeans_seg_masks = 16
  c.tokenizer_training.kmeans_iterations = 2
  c.tokenizer_training.revive_every = 2
  c.tokenizer_training.entropy_from = 4
  c.tokenizer_training.entropy_every = 2
  c.eval.max_samples = 8
  c.eval.batch_size = 4
  c.eval.splits = ("val",)
  return run_config(c)


def write_data(folder: pathlib.Path) -> pathlib.Path:
  """What `COMMAND` trains on."""
  return builder.prepare(folder, num_train=24, num_eval=8, seed=0)


def options(data: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  """Where `COMMAND` reads and writes; nothing is left to evaluate at its
  end."""
  workdir.mkdir(exist_ok=True)
  (workdir / "results.json").write_text("{}")
  return [f"--config.data.path={data}", f"--workdir={workdir}"]


def losses(path: pathlib.Path) -> dict[int, float]:
  """Losses by step, of a task's folder."""
  lines = (path / "metrics.jsonl").read_text().splitlines()
  values = [json.loads(line) for line in lines]
  return {v["step"]: v["loss"] for v in values if "loss" in v}
