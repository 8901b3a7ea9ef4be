"""PyTorch folders to checkpoints that `train`, `eval` and `predict` open."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, config_parsing, sharding, variants
from argenseg_jax.config import DataConfig, EvalConfig, MeshConfig
from argenseg_jax.data import chat, text
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.runtime.paths import Path, copy, copy_tree, disk_path
from argenseg_jax.torch_weights import (
  byte_tokenizer,
  hf_config,
  mapping,
  rules,
  tables,
  tensors,
)
from argenseg_jax.torch_weights import text_tokenizer as text_tokenizer_lib
from argenseg_jax.torch_weights.tensors import (
  Computed,
  Merged,
  Renamed,
  Source,
  TensorInfo,
  WeightsError,
)

# Among the kept files: tensors that compute nothing.
KEPT_TENSORS = "carried.safetensors"
_KEPT_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_TOKENIZER = "image_tokenizer."


@dataclasses.dataclass(frozen=True)
class Imported:
  """What was read, for the message to the user."""

  task: str
  config: ModelConfig
  num_tensors: int
  fresh_image_tokenizer: bool
  text_tokenizer: bool


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Everything decided before the first tensor is read."""

  task: str
  config: ModelConfig
  table: tables.Table
  source: Source
  new_tokens: bool
  fresh_image_tokenizer: bool
  text_tokenizer: pathlib.Path | None = None


def import_weights(
  source_path: str | os.PathLike,
  target: str | os.PathLike,
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
    plan = _plan(path, vqvae_path, scales, file)
    in_bytes = text_tokenizer == byte_tokenizer.NAME and file is None
    return _import(path, target, plan, mesh, in_bytes=in_bytes)


def _import(
  path: pathlib.Path,
  target: pathlib.Path,
  plan: _Plan,
  mesh: Mesh,
  *,
  in_bytes: bool,
) -> Imported:
  where = str(path)
  make = checkpoint.model_factory(plan.task, plan.config)
  abstract = nnx.state(nnx.eval_shape(make))
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


def whole_config(
  config: Mapping[str, Any],
  source: Source,
  folder: pathlib.Path | None,
  text_tokenizer: pathlib.Path | None = None,
) -> ModelConfig:
  """The config of a whole ARGenSeg checkpoint.

  Args:
    config: its config.json.
    source: its tensors, in the authors' naming.
    folder: for the ids of special tokens; None takes the known ones.
    text_tokenizer: a tokenizer.json that is asked first.
  """
  found = source.tensors
  name = "language_model."
  heads = (f"{name}output.weight", f"{name}lm_head.weight")
  llm = hf_config.llm_config(
    hf_config.group(config, "llm"), tied_head=_tied(config, found, heads)
  )
  image_tokenizer = {
    n.removeprefix(_TOKENIZER): t
    for n, t in found.items()
    if n.startswith(_TOKENIZER) or n == "pos_1LC"
  }
  vqvae = hf_config.vqvae_config(config, image_tokenizer, "the checkpoint")
  first_code = llm.vocab_size - vqvae.num_codes
  if config.get("text_vocab", first_code) != first_code:
    raise WeightsError(
      f"config.json has text_vocab {config['text_vocab']}, but its vocab_size "
      f"{llm.vocab_size} without {vqvae.num_codes} codes is {first_code}."
    )
  return ModelConfig(
    name="imported",
    vision=hf_config.vision_config(config),
    llm=llm,
    vqvae=vqvae,
    token_ids=hf_config.token_ids(config, first_code, folder, text_tokenizer),
  )


def _plan(path, vqvae_path, scales, text_tokenizer) -> _Plan:
  source = tensors.open_file(path)
  found = source.tensors
  extra = {"patch_nums": list(scales)} if scales else {}
  if "quantize.embedding.weight" in found:
    if vqvae_path is not None:
      raise WeightsError(f"{path} is an image tokenizer: leave --vqvae out.")
    return _image_tokenizer_plan(path, source, extra)
  if not path.is_dir():
    raise WeightsError(f"{path} is no image tokenizer; give a whole folder.")
  config = hf_config.read(path) | extra
  if "word_embed.weight" in found:
    if vqvae_path is not None:
      raise WeightsError(f"{path} has an image tokenizer: leave --vqvae out.")
    whole = whole_config(config, source, path, text_tokenizer)
    table = rules.argenseg(whole)
    return _Plan("mllm", whole, table, source, False, False, text_tokenizer)
  if "mlp1.0.weight" not in found:
    raise WeightsError(
      f"{path} is neither ARGenSeg, InternVL2.5 nor VAR's image tokenizer: it "
      "has no tensor 'mlp1.0.weight' or 'quantize.embedding.weight'."
    )
  return _internvl_plan(path, source, config, vqvae_path, text_tokenizer)


def _image_tokenizer_plan(path, source, extra) -> _Plan:
  config = extra
  if path.is_dir() and (path / "config.json").is_file():
    config = hf_config.read(path) | extra
  vqvae = hf_config.vqvae_config(config, source.tensors, str(path))
  base = variants.get("argenseg_8b")
  whole = dataclasses.replace(base, name="imported", vqvae=vqvae)
  return _Plan("vqvae", whole, rules.vqvae(vqvae), source, False, False)


def _internvl_plan(path, source, config, vqvae_path, text_tokenizer) -> _Plan:
  """InternVL2.5 with new tokens, zero code embeddings, an image tokenizer."""
  found = source.tensors
  values = hf_config.group(config, "llm")
  names = ("output.weight", "lm_head.weight", "model.embed_tokens.weight")
  names = [
    f"language_model.{n}" for n in (*names, "model.tok_embeddings.weight")
  ]
  tied = _tied(config, found, names[:2])
  llm = hf_config.llm_config(values, tied_head=tied)
  if vqvae_path is None:
    vqvae, parts = variants.get("argenseg_8b").vqvae, []
    if "patch_nums" in config:
      sides = tuple(config["patch_nums"])
      vqvae = dataclasses.replace(
        vqvae, scales=sides, image_side=16 * sides[-1]
      )
  else:
    image_tokenizer = tensors.open_file(vqvae_path)
    vqvae = hf_config.vqvae_config(
      config, image_tokenizer.tensors, str(vqvae_path)
    )
    parts = [Renamed(image_tokenizer, _TOKENIZER)]
  # Rows that only pad the vocabulary to a round number stay out.
  known = text_tokenizer_lib.size(text_tokenizer) or llm.vocab_size
  old_rows = min(llm.vocab_size, known)
  first_code = old_rows + len(text.ADDED_TOKENS)
  rows = first_code + vqvae.num_codes
  whole = ModelConfig(
    name="imported",
    vision=hf_config.vision_config(config),
    llm=dataclasses.replace(llm, vocab_size=rows),
    vqvae=vqvae,
    token_ids=hf_config.token_ids(config, first_code, path, text_tokenizer),
  )
  table = rules.argenseg(whole)
  if vqvae_path is None:
    table = tables.Table(
      tuple(r for r in table.rules if not r.torch.startswith(_TOKENIZER))
    )
  grown = {n: _grown(source, n, old_rows, rows) for n in names if n in found}
  dtype = next(iter(grown.values()))[0].dtype if grown else np.float32
  zeros = {
    "word_embed.weight": (llm.width, vqvae.latent_channels),
    "word_embed.bias": (llm.width,),
    "pos_1LC": (1, vqvae.codes_per_mask, llm.width),
    "lvl_embed.weight": (len(vqvae.scales), llm.width),
  }
  new = {n: _zeros(shape, dtype) for n, shape in zeros.items()}
  merged = Merged(source, Computed(grown), Computed(new), *parts)
  fresh = vqvae_path is None
  return _Plan("mllm", whole, table, merged, True, fresh, text_tokenizer)


def _tied(
  config: Mapping[str, Any], found: Mapping[str, Any], heads: Sequence[str]
) -> bool:
  """Whether the embedding is the head, too.

  Raises:
    WeightsError: there is no head, and config.json does not say so.
  """
  if any(head in found for head in heads):
    return False
  key = "tie_word_embeddings"
  if hf_config.group(config, "llm").get(key, config.get(key)):
    return True
  raise WeightsError(
    f"the folder lacks the head {heads[0]!r} (or {heads[1]!r}), and its "
    f"config.json does not say {key}: a file is missing; fetch it again."
  )


def _zeros(shape, dtype):
  info = TensorInfo(shape, np.dtype(dtype))
  return info, lambda: np.zeros(shape, dtype)


def _grown(source: Source, name: str, old: int, rows: int):
  """The first `old` rows of a matrix and more: each new one their mean."""
  (_, width), dtype = source.tensors[name]

  def make():
    grown = np.empty((rows, width), dtype)
    grown[:old] = source.read(name)[:old]
    total = np.zeros(width, np.float64)
    for start in range(0, old, 4096):
      total += grown[start : min(start + 4096, old)].astype(np.float64).sum(0)
    grown[old:] = (total / old).astype(dtype)
    return grown

  return TensorInfo((rows, width), dtype), make


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


def _keep_files(path, folder, plan: _Plan, kept: list[str]) -> None:
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
