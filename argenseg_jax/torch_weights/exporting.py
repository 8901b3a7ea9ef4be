"""Checkpoints to PyTorch folders in the authors' naming and layout."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import lora
from argenseg_jax.runtime.paths import Path, copy, disk_path, fetched
from argenseg_jax.torch_weights import (
  families,
  hf_config,
  mapping,
  rules,
  tables,
  tensors,
)
from argenseg_jax.torch_weights.importing import (
  KEPT_TENSORS,
  copy_files,
  written_whole,
)
from argenseg_jax.torch_weights.tensors import WeightsError

Part = Literal["all", "llm", "vqvae"]
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_INNER = {"llm": ("llm.", "language_model."), "vqvae": ("vqvae.", "")}


def export_weights(
  source_path: str | Path,
  target: str | Path,
  *,
  mesh: Mesh,
  part: Part = "all",
  dtype: str | None = None,
  files_from: str | Path | None = None,
  max_file_bytes: int = 5_000_000_000,
  merge: bool = False,
) -> int:
  """Writes a checkpoint as a Hugging Face style folder.

  Args:
    source_path: see `checkpoint.step_directory`.
    target: the folder to be made; it must not exist.
    mesh: the checkpoint is read onto it.
    part: the whole model, the language model or the image tokenizer alone.
    dtype: of all floating-point tensors; None keeps each as it is.
    files_from: folder whose config.json, text tokenizer and code are carried
      along; by default what import kept, handed on by training. A checkpoint
      without either gives its tokenizer.json.
    max_file_bytes: largest file.
    merge: add adapters to the weights that they adapt.

  Returns:
    How many tensors were written.

  Raises:
    WeightsError: the checkpoint cannot be written so; nothing is left behind.
  """
  target = disk_path(target)
  loaded = checkpoint.load(source_path, mesh=mesh)
  if loaded.adapters is not None and not merge:
    raise WeightsError(
      f"{source_path} contains adapters; add --merge for a whole model, or "
      "export them alone with --part adapters."
    )
  lora.merge(loaded.model)
  if part == "all" and not loaded.is_whole:
    part = "vqvae"
  if part == "llm" and not loaded.is_whole:
    raise WeightsError(f"{source_path} is an image tokenizer, without llm.")
  refuse_variants(loaded.config, part)
  checkpoint.require_unchanged(loaded.path)
  with fetched(checkpoint.kept_files(loaded.path)) as kept:
    return _write(loaded, kept, target, part, dtype, files_from, max_file_bytes)


def _write(
  loaded: checkpoint.Loaded,
  kept: pathlib.Path,
  target: pathlib.Path,
  part: Part,
  dtype: str | None,
  files_from: str | Path | None,
  max_file_bytes: int,
) -> int:
  files = kept if files_from is None else disk_path(files_from)
  if files_from is not None and not files.is_dir():
    raise WeightsError(f"{files} is not a folder.")
  leaves = {
    path: leaf.get_value()
    for path, leaf in mapping.variables(nnx.state(loaded.model)).items()
  }
  config = loaded.config
  prefix = ""
  if part == "all":
    table = writable(rules.argenseg(config), leaves)
  else:
    made = {"llm": families.table, "vqvae": rules.vqvae}
    table = made[part](getattr(config, part))
    if loaded.is_whole:
      ours, prefix = f"{part}.", _INNER[part][1] or "image_tokenizer."
      leaves = {
        path.removeprefix(ours): leaf
        for path, leaf in leaves.items()
        if path.startswith(ours)
      }
  carried = None
  if (kept / KEPT_TENSORS).is_file():
    carried = _Unprefixed(tensors.SafetensorsFile(kept / KEPT_TENSORS), prefix)
  odd = loaded.meta.get("torch_dtypes", {})
  source = mapping.Exported(
    table,
    leaves,
    dtypes={name.removeprefix(prefix): d for name, d in odd.items()},
    carried=carried,
  )
  if dtype is not None:
    source = _Cast(source, tensors.DTYPES[_DTYPES[dtype]])
  with written_whole(target) as folder:
    if part != "vqvae":
      copy_files(files, folder)
      text_tokenizer = checkpoint.text_tokenizer_path(loaded.path)
      if files_from is None and text_tokenizer.is_file():
        copy(text_tokenizer, folder / text_tokenizer.name)
    values = _config(loaded.config, part, files)
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n")
    tensors.write_folder(folder, source, max_file_bytes=max_file_bytes)
  return len(source.tensors)


def writable(table: tables.Table, leaves: Mapping[str, Any]) -> tables.Table:
  """The table, if the authors' model has a place for every variable."""
  known = {path for rule in table.rules for path in rule.ours}
  for path in leaves:
    if path not in known and not path.endswith(mapping.OURS_ONLY):
      raise WeightsError(
        f"the authors' model has no place for {path}: this variant (aligned "
        "positions or a convolutional stem) cannot be exported."
      )
  return table


def refuse_variants(config: ModelConfig, part: Part) -> None:
  """Names a setting that the authors' code does not have.

  Settings with variables of their own are left to `writable`.
  """
  vqvae, llm = config.vqvae, config.llm
  found = {}
  if part != "llm":
    found["vqvae.patch_side"] = vqvae.patch_side != 1
    found["vqvae.norm_groups"] = vqvae.norm_groups != 32
  if part != "vqvae":
    found["llm.rope_fraction"] = llm.rope_fraction != 1
    for key, differs in families.of(llm).misfits(llm).items():
      found[f"llm.{key}"] = differs
  if part == "all":
    found["full_attention_in_scale"] = config.full_attention_in_scale
    found["bidirectional_prompt"] = config.bidirectional_prompt
  for key, differs in found.items():
    if differs:
      raise WeightsError(
        f"the authors' code has no place for this model's {key!r}: this "
        "variant cannot be exported."
      )


def _config(config, part: Part, files: pathlib.Path) -> dict[str, Any]:
  """The folder's own config.json, with the numbers of this model."""
  if part == "vqvae":
    return hf_config.write_vqvae(config.vqvae)
  whole = hf_config.write(config)
  if (files / "config.json").is_file():
    whole = _corrected(hf_config.read(files), whole)
  return whole if part == "all" else hf_config.group(whole, "llm")


def _corrected(kept: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
  """`kept` with the numbers of `ours` that it names, and with what only a
  whole ARGenSeg has."""

  def numbers(kept, ours):
    return kept | {
      k: v
      for k, v in ours.items()
      if k in kept and isinstance(v, (int, float)) and kept[k] != v
    }

  whole: dict[str, Any] = {"text_vocab": ours["text_vocab"]}
  whole |= numbers(kept, ours)
  for name in ("llm", "vision"):
    mine = ours[f"{name}_config"]
    key = f"{name}_config" if f"{name}_config" in kept else name
    whole[key] = numbers(hf_config.group(kept, name), mine)
    if name == "llm":
      added = ("vocab_size", "tie_word_embeddings")
      whole[key] |= {k: mine[k] for k in added}
  whole["patch_nums"] = ours["patch_nums"]
  vae = kept.get("vae")
  whole["vae"] = ours["vae"] if vae is None else numbers(vae, ours["vae"])
  return whole


class _Cast:
  """A source whose floating-point tensors get another dtype."""

  def __init__(self, source: tensors.Source, dtype: np.dtype):
    self._source = source
    self.tensors = {
      name: info._replace(
        dtype=dtype if tensors.is_floating(info.dtype) else info.dtype
      )
      for name, info in source.tensors.items()
    }

  def read(self, name: str) -> np.ndarray:
    value, dtype = self._source.read(name), self.tensors[name].dtype
    if dtype == np.float16 and dtype != value.dtype:
      self._require_range(name, value)
    return value.astype(dtype, copy=False)

  def _require_range(self, name: str, value: np.ndarray) -> None:
    """Refuses finite values that float16 would make infinite."""
    size = np.abs(value.astype(np.float32))
    # Above this, rounding gives infinity.
    over = np.isfinite(size) & (size >= 65520)
    if count := np.count_nonzero(over):
      raise WeightsError(
        f"float16 cannot hold {count} values of {name!r} (up to "
        f"{size[over].max():.4g}, its largest is 65504); use --dtype bfloat16."
      )


class _Unprefixed:
  """The tensors of a source below a prefix, without it."""

  def __init__(self, source: tensors.Source, prefix: str):
    self._source, self._prefix = source, prefix
    self.tensors = {
      name.removeprefix(prefix): info for name, info in source.tensors.items()
    }

  def read(self, name: str) -> np.ndarray:
    whole = self._prefix + name
    return self._source.read(whole if whole in self._source.tensors else name)
