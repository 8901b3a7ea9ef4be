"""Adapters <-> the folder that PyTorch's `peft` reads and writes."""

import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, config_parsing, construct, sharding
from argenseg_jax.config import LoRAConfig
from argenseg_jax.models import lora
from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import Path, disk_path
from argenseg_jax.torch_weights import mapping, rules, tensors
from argenseg_jax.torch_weights.importing import keep_files, written_whole
from argenseg_jax.torch_weights.peft_tensors import (
  CONFIG,
  PREFIX,
  WEIGHTS,
  adapter_pairs,
  at_layer,
  module_tensors,
  read_adapters,
  with_one_rank,
)
from argenseg_jax.torch_weights.tensors import (
  Computed,
  TensorInfo,
  WeightsError,
)

# Settings of PEFT that change what adapters compute, and that we do not have.
_REFUSED = (
  *("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save"),
  *("lora_bias", "trainable_token_indices", "use_qalora", "target_parameters"),
)


def export_adapters(
  source_path: str | Path, target: str | Path, *, mesh: Mesh
) -> int:
  """Writes a checkpoint of adapters as a folder that `peft` loads onto the
  authors' model; their base is not read.

  Returns:
    How many tensors were written.

  Raises:
    WeightsError: no adapters there, or parts that were trained in full.
  """
  found, variables = checkpoint.load_adapters(source_path, mesh=mesh)
  assert found.adapters is not None
  config = found.adapters.lora
  leaves = {
    path: np.asarray(leaf.get_value(), np.float32)
    for path, leaf in mapping.variables(variables).items()
    if isinstance(leaf, lora.Adapter)
  }
  full = sorted(mapping.variables(lora.without_adapters(variables)))
  if full:
    raise WeightsError(
      f"{source_path} also trained {full[0]} in full, which PEFT's format has "
      "no place for; export the whole model with --merge."
    )
  arrays: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  patterns = []
  for rule in rules.argenseg(found.config).rules:
    pairs = adapter_pairs(rule, leaves)
    if not any(pair is not None for pair in pairs):
      continue
    module = rule.torch.removesuffix(".weight")
    patterns.append(re.escape(module).replace(r"\{\}", r"\d+"))
    for i, name in enumerate(rule.names()):
      layer = [at_layer(rule, pair, i) for pair in pairs]
      a, b = module_tensors(rule, layer)
      ranks[module.rpartition(".")[2]] = len(a)
      stem = PREFIX + name.removesuffix(".weight")
      arrays[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a)
      arrays[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b)
  odd = {name: rank for name, rank in ranks.items() if rank != config.rank}
  values = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": found.adapters.base_path,
    "bias": "none",
    "inference_mode": True,
    "lora_alpha": config.alpha,
    "lora_dropout": 0.0,
    "r": config.rank,
    "rank_pattern": odd,
    "alpha_pattern": {
      name: config.alpha * rank / config.rank for name, rank in odd.items()
    },
    "target_modules": "|".join(patterns),
  }
  with written_whole(disk_path(target)) as folder:
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    tensors.write_file(folder / WEIGHTS, _source(arrays), arrays)
  return len(arrays)


def import_adapters(
  source_path: str | Path,
  target: str | Path,
  *,
  base: str | Path,
  mesh: Mesh,
) -> int:
  """Reads a folder of PEFT and writes a checkpoint of adapters.

  Args:
    source_path: adapters of the authors' model, or of its language model.
    target: the work directory to be made; it must not exist.
    base: checkpoint of the model that they adapt.
    mesh: the base is read onto it, to be named.

  Returns:
    How many tensors were read.

  Raises:
    WeightsError: they do not fit the base; nothing is left behind.
  """
  path = disk_path(source_path)
  values = _read_config(path)
  source = tensors.SafetensorsFile(path / WEIGHTS)
  loaded = checkpoint.load(base, mesh=mesh)
  if not loaded.is_whole or loaded.adapters is not None:
    raise WeightsError(f"--base {base} is not a whole model without adapters.")
  found = read_adapters(source, values, loaded.config, path)
  config, arrays = with_one_rank(found)
  graph, variables = nnx.split(loaded.model)
  model = construct.abstract(
    lambda state: _adapted(nnx.merge(graph, state), config), variables
  )
  _, wanted, _ = nnx.split(
    model, lora.trainable_filter(config, nnx.state(model)), ...
  )
  shardings = mapping.variables(sharding.state_shardings(wanted, mesh))
  state = nnx.from_flat_state(
    [
      (keys, leaf.replace(_put(arrays, ".".join(map(str, keys)), shardings)))
      for keys, leaf in nnx.to_flat_state(wanted)
    ]
  )
  adapters = checkpoint.Adapters(
    lora.fingerprint(variables),
    str(paths.absolute(paths.as_path(loaded.path))),
    config,
  )
  meta = {"task": loaded.task, "model": config_parsing.to_dict(loaded.config)}
  meta |= {
    k: loaded.meta[k] for k in ("run", "torch_dtypes") if k in loaded.meta
  }
  meta["adapters"] = config_parsing.to_dict(adapters)
  with written_whole(disk_path(target)) as folder:
    keep_files(loaded.path, folder)
    checkpoints = checkpoint.Checkpoints(folder)
    try:
      checkpoints.save(0, state, None, meta)
      checkpoints.wait()
    finally:
      checkpoints.close()
  return len(source.tensors)


def is_peft(path: str | os.PathLike) -> bool:
  """Whether a folder holds adapters."""
  return (pathlib.Path(path) / CONFIG).is_file()


def _adapted(model: nnx.Module, config: LoRAConfig) -> nnx.Module:
  lora.adapt(model, config)
  return model


def _source(arrays: dict[str, np.ndarray]) -> Computed:
  return Computed(
    {
      n: (TensorInfo(a.shape, a.dtype), lambda a=a: a)
      for n, a in arrays.items()
    }
  )


def _put(arrays, name: str, shardings) -> jax.Array:
  return jax.device_put(arrays[name], shardings[name].get_value())


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    values = json.loads((path / CONFIG).read_text())
    if values["peft_type"] != "LORA" or int(values["r"]) < 1:
      raise ValueError(f"peft_type {values['peft_type']!r}, r {values['r']!r}")
    float(values["lora_alpha"])
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise WeightsError(
      f"{path / CONFIG} does not describe LoRA adapters ({error!r})."
    ) from error
  for key in _REFUSED:
    if values.get(key):
      raise WeightsError(
        f"{path / CONFIG} has {key} {values[key]!r}, which is not supported."
      )
  if values.get("bias", "none") != "none":
    raise WeightsError(
      f"{path / CONFIG} has bias {values['bias']!r}; only 'none' is supported."
    )
  return values
