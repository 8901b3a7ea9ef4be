"""What a PyTorch folder holds, decided before its first tensor is read."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from argenseg_jax import variants
from argenseg_jax.data import text
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.torch_weights import hf_config, rules, tables, tensors
from argenseg_jax.torch_weights import text_tokenizer as text_tokenizer_lib
from argenseg_jax.torch_weights.tensors import (
  Computed,
  Merged,
  Renamed,
  Source,
  TensorInfo,
  WeightsError,
)

_TOKENIZER = "image_tokenizer."


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything decided before the first tensor is read."""

  task: str
  config: ModelConfig
  table: tables.Table
  source: Source
  new_tokens: bool
  fresh_image_tokenizer: bool
  text_tokenizer: pathlib.Path | None = None


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


def make_plan(
  path: pathlib.Path,
  vqvae_path: str | os.PathLike | None,
  scales: tuple[int, ...] | None,
  text_tokenizer: pathlib.Path | None,
) -> Plan:
  """Tells what a folder or file holds, and how to read it.

  Args:
    path: of the folder or file.
    vqvae_path: an image tokenizer beside it.
    scales: side lengths of the token maps, where config.json has none.
    text_tokenizer: a tokenizer.json.

  Raises:
    WeightsError: it holds nothing known, or not all of it.
  """
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
    return Plan("mllm", whole, table, source, False, False, text_tokenizer)
  if "mlp1.0.weight" not in found:
    raise WeightsError(
      f"{path} is neither ARGenSeg, InternVL2.5 nor VAR's image tokenizer: it "
      "has no tensor 'mlp1.0.weight' or 'quantize.embedding.weight'."
    )
  return _internvl_plan(path, source, config, vqvae_path, text_tokenizer)


def _image_tokenizer_plan(
  path: pathlib.Path, source: Source, extra: dict[str, Any]
) -> Plan:
  config = extra
  if path.is_dir() and (path / "config.json").is_file():
    config = hf_config.read(path) | extra
  vqvae = hf_config.vqvae_config(config, source.tensors, str(path))
  base = variants.get("argenseg_8b")
  whole = dataclasses.replace(base, name="imported", vqvae=vqvae)
  return Plan("vqvae", whole, rules.vqvae(vqvae), source, False, False)


def _internvl_plan(
  path: pathlib.Path,
  source: Source,
  config: dict[str, Any],
  vqvae_path: str | os.PathLike | None,
  text_tokenizer: pathlib.Path | None,
) -> Plan:
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
  return Plan("mllm", whole, table, merged, True, fresh, text_tokenizer)


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
