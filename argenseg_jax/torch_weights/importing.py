"""PyTorch folders to checkpoints that `train`, `eval` and `predict` open."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, config_parsing, construct, sharding
from argenseg_jax.config import DataConfig, EvalConfig, MeshConfig
from argenseg_jax.data import chat, text
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.runtime.paths import Path, copy, copy_tree, disk_path
from argenseg_jax.torch_weights import byte_tokenizer, mapping, tensors
from argenseg_jax.torch_weights import text_tokenizer as text_tokenizer_lib
from argenseg_jax.torch_weights.recognize import Plan, make_plan
from argenseg_jax.torch_weights.tensors import WeightsError

# Among the kept files: tensors that compute nothing.
KEPT_TENSORS = "carried.safetensors"
_KEPT_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")


@dataclasses.dataclass(frozen=True)
class Imported:
  """What was read, for the message to the user."""

  task: str
  config: ModelConfig
  num_tensors: int
  fresh_image_tokenizer: bool
  text_tokenizer: bool


def import_weights(
  source_path: str | Path,
  target: str | Path,
  *,
  mesh: Mesh,
  vqvae_path: str | os.PathLike | None = None,
  scales: tuple[int, ...] | None = None,
  text_tokenizer: str | os.PathLike | None = None,
) -> Imported:
  """Reads a PyTorch folder or file and writes a checkpoint.

  Args:
    source_path: an ARGenSeg or InternVL2.5 folder, or VAR's image tokenizer.
    target: the work directory to be made; it must not exist.
    mesh: variables are born sharded over it.
    vqvae_path: VAR's image tokenizer, for an InternVL2.5 folder.
    scales: side lengths of the token maps, where config.json has none.
    text_tokenizer: a tokenizer.json, or "bytes" for one that is made
      (`byte_tokenizer`); by default that of the folder, or one made from its
      `tokenizer.model` or `vocab.json` and `merges.txt`.

  Raises:
    WeightsError: something does not fit; nothing is left behind.
  """
  path, target = disk_path(source_path), disk_path(target)
  with text_tokenizer_lib.opened(path, text_tokenizer) as file:
    plan = make_plan(path, vqvae_path, scales, file)
    in_bytes = text_tokenizer == byte_tokenizer.NAME and file is None
    return _import(path, target, plan, mesh, in_bytes=in_bytes)


def _import(
  path: pathlib.Path,
  target: pathlib.Path,
  plan: Plan,
  mesh: Mesh,
  *,
  in_bytes: bool,
) -> Imported:
  where = str(path)
  make = checkpoint.model_factory(plan.task, plan.config)
  abstract = nnx.state(construct.abstract(make))
  if plan.fresh_image_tokenizer:
    _, abstract = nnx.split_state(
      abstract, lambda keys, leaf: keys[0] == "vqvae", ...
    )
  kept = mapping.check(
    plan.table, mapping.variables(abstract), plan.source, where
  )
  with written_whole(target) as folder:
    _keep_files(path, folder, plan, kept)
    if in_bytes:
      if plan.task != "mllm":
        raise WeightsError(f"{path} reads no text: leave --tokenizer out.")
      made = byte_tokenizer.make(plan.config.token_ids)
      made.save(str(folder / "tokenizer.json"))
    state, odd = mapping.load(plan.table, abstract, plan.source, mesh)
    if plan.fresh_image_tokenizer:
      state = nnx.merge_state(state, _fresh_image_tokenizer(plan.config))
    meta = {
      "task": plan.task,
      "model": config_parsing.to_dict(plan.config),
      "torch_dtypes": odd,
    }
    if plan.task == "mllm":
      meta["run"] = _settings(plan.config)
    # Writing copies what it writes: let it not copy the model.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(state))
    checkpoints = checkpoint.Checkpoints(
      folder, concurrent_gb=max(1.0, 1.1 * largest / 1e9)
    )
    try:
      checkpoints.save(0, state, None, meta)
      checkpoints.wait()
    finally:
      checkpoints.close()
  return Imported(
    plan.task,
    plan.config,
    len(plan.source.tensors),
    plan.fresh_image_tokenizer,
    (target / "tokenizer.json").is_file(),
  )


def conversion_mesh(fsdp: int = 0) -> Mesh:
  """`fsdp` devices that share every parameter; 0 takes all accelerators, or
  one CPU device (several would hold copies in one memory)."""
  devices = jax.devices()
  count = fsdp or (1 if devices[0].platform == "cpu" else len(devices))
  config = MeshConfig(data=1, fsdp=count, tensor=1)
  return sharding.make_mesh(config, devices[:count])


@contextlib.contextmanager
def written_whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder that gets its name when the block ends, and vanishes if it fails.

  Raises:
    WeightsError: `target` exists already.
  """
  if target.exists():
    raise WeightsError(f"{target} exists already; name a new folder.")
  folder = target.absolute().with_name(f".{target.name}.partial-{os.getpid()}")
  try:
    folder.mkdir(parents=True)
    yield folder
    folder.rename(target)
  except OSError as error:
    raise WeightsError(f"{target} cannot be written: {error}.") from error
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _settings(config: ModelConfig) -> dict[str, Any]:
  """The part of a run that predict and eval read: the authors' evaluation."""
  text_tokens = 512  # Room for the system message, a request and an answer.
  data = DataConfig(
    path="",
    source="jsonl",
    split="val",
    join="evaluation",
    system_message=chat.INTERNVL_SYSTEM_MESSAGE,
    sequence_length=config.vision.num_embeddings
    + config.vqvae.codes_per_mask
    + text_tokens,
    image_side=config.vision.image_side,
    mask_side=config.vqvae.image_side,
    mask_channels=1,
  )
  limits = EvalConfig(
    splits=("val",),
    max_samples=0,
    batch_size=8,
    max_text=32,
    max_masks=1,
    start_with_mask=False,
  )
  return {
    "data": config_parsing.to_dict(data),
    "eval": config_parsing.to_dict(limits),
  }


def _fresh_image_tokenizer(config: ModelConfig) -> nnx.State:
  make = checkpoint.model_factory("vqvae", config)
  state = jax.jit(lambda: nnx.state(make()))()
  return nnx.State({"vqvae": state})


def keep_files(step: Path, folder: pathlib.Path) -> None:
  """Copies what lies beside a checkpoint's steps into a work directory: its
  text tokenizer, and what import kept."""
  tokenizer = checkpoint.text_tokenizer_path(step)
  if tokenizer.is_file():
    copy(tokenizer, folder / tokenizer.name)
  kept = checkpoint.kept_files(step)
  if kept.is_dir():
    copy_tree(kept, folder / kept.name)


def copy_files(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what stands beside the weights of a Hugging Face style folder:
  config, text tokenizer, code. Nothing where `source` is no folder."""
  for pattern in _KEPT_PATTERNS:
    for file in source.glob(pattern) if source.is_dir() else ():
      if not file.name.endswith(".index.json"):
        shutil.copyfile(file, target / file.name)


def _keep_files(path, folder, plan: Plan, kept: list[str]) -> None:
  """Config, text tokenizer and idle buffers, for export and for prediction."""
  beside = folder / checkpoint.KEPT
  beside.mkdir()
  copy_files(path, beside)
  if kept:
    tensors.write_file(beside / KEPT_TENSORS, plan.source, kept)
  if plan.text_tokenizer is not None:
    mine = beside / "tokenizer.json"
    shutil.copyfile(plan.text_tokenizer, mine)
    if plan.new_tokens:
      ids = plan.config.token_ids
      wanted = (ids.mask, ids.ge_start, ids.ge_end, ids.mask_context)
      text_tokenizer_lib.add_tokens(
        beside, dict(zip(text.ADDED_TOKENS, wanted, strict=True))
      )
    made = text.TextTokenizer(
      mine if plan.new_tokens else plan.text_tokenizer,
      first_code=plan.config.token_ids.first_code,
    )
    made.require(plan.config.token_ids)
    shutil.copyfile(mine, folder / "tokenizer.json")
