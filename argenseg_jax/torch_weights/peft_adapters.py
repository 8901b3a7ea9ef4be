"""Adapters <-> the folder that PyTorch's `peft` reads and writes.

Modules have the authors' names. Where their module holds several of our
projections (InternLM2's `wqkv`), its A stacks ours and its B has a block for
each, or they share one A, as they do after import.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from argenseg_jax import checkpoint, config_parsing, sharding
from argenseg_jax.config import LoRAConfig
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import lora
from argenseg_jax.runtime import paths
from argenseg_jax.runtime.paths import disk_path
from argenseg_jax.torch_weights import mapping, rules, tensors
from argenseg_jax.torch_weights.importing import keep_files, written_whole
from argenseg_jax.torch_weights.tables import Rule
from argenseg_jax.torch_weights.tensors import (
  Computed,
  TensorInfo,
  WeightsError,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LLM = "language_model."
# Settings of PEFT that change what adapters compute, and that we do not have.
_REFUSED = (
  *("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save"),
  *("lora_bias", "trainable_token_indices", "use_qalora", "target_parameters"),
)


def export_adapters(
  source_path: str | os.PathLike, target: str | os.PathLike, *, mesh: Mesh
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
    pairs = _pairs(rule, leaves)
    if not any(pair is not None for pair in pairs):
      continue
    module = rule.torch.removesuffix(".weight")
    patterns.append(re.escape(module).replace(r"\{\}", r"\d+"))
    for i, name in enumerate(rule.names()):
      layer = [p and (_at(rule, p[0], i), _at(rule, p[1], i)) for p in pairs]
      a, b = _to_torch(rule, layer)
      ranks[module.rpartition(".")[2]] = len(a)
      stem = _PREFIX + name.removesuffix(".weight")
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
  source_path: str | os.PathLike,
  target: str | os.PathLike,
  *,
  base: str | os.PathLike,
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
  found = _read(source, values, loaded.config, path)
  config, arrays = _of_one_rank(found)
  graph, variables = nnx.split(loaded.model)
  model = nnx.eval_shape(
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


# Export.

Pair = tuple[np.ndarray, np.ndarray]  # A [in rank], B [rank out], or stacks.


def _pairs(rule: Rule, leaves: dict[str, np.ndarray]) -> list[Pair | None]:
  """Adapters of a rule's projections; None for one without."""
  found: list[Pair | None] = []
  for path in rule.ours:
    stem = path.removesuffix(".kernel")
    a, b = leaves.get(f"{stem}.lora_a"), leaves.get(f"{stem}.lora_b")
    is_kernel = stem != path and a is not None and b is not None
    found.append((a, b) if is_kernel else None)
  return found


def _at(rule: Rule, stack: np.ndarray, layer: int) -> np.ndarray:
  return stack[layer] if rule.stack else stack


def _to_torch(rule: Rule, pairs: list[Pair | None]) -> Pair:
  """PyTorch's A [rank in] and B [out rank] of one module."""
  given = [pair for pair in pairs if pair is not None]
  first = given[0][0]
  if len(given) == len(pairs) and all(
    np.array_equal(a, first) for a, _ in given
  ):
    return first.T, rule.transform.to_torch(tuple(b for _, b in given))
  widths = _widths(rule, pairs)
  blocks = []
  for i, pair in enumerate(pairs):
    if pair is not None:
      rank = pair[1].shape[0]
      parts = [np.zeros((rank, width), np.float32) for width in widths]
      parts[i] = pair[1]
      blocks.append(rule.transform.to_torch(tuple(parts)))
  return np.concatenate([a.T for a, _ in given]), np.concatenate(blocks, 1)


def _widths(rule: Rule, pairs: list[Pair | None]) -> list[int]:
  """Outputs of each projection of a fused module. Of query, key and value the
  last two are equal, so that one of them tells the other."""
  known = [None if pair is None else pair[1].shape[1] for pair in pairs]
  if None in known[1:]:
    known[1:] = [max(k or 0 for k in known[1:])] * (len(known) - 1)
  if any(not k for k in known):
    raise WeightsError(
      f"{rule.torch} holds {', '.join(rule.ours)}: adapt all of them, or "
      "export the whole model with --merge."
    )
  return [k for k in known if k]


# Import.


@dataclasses.dataclass(frozen=True)
class _Found:
  """Adapters of one of our projections, as PEFT had them."""

  path: str  # Of the projection.
  scaling: float
  a: np.ndarray  # [in rank], or a stack.
  b: np.ndarray  # [rank out], or a stack.


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


def _read(
  source: tensors.Source,
  values: dict[str, Any],
  model: ModelConfig,
  path: pathlib.Path,
) -> list[_Found]:
  """Adapters of every projection; each tensor is used once.

  Raises:
    WeightsError: one is missing, unexpected or of another shape.
  """
  names = {_module(name): name for name in source.tensors}
  used: set[str] = set()
  found: list[_Found] = []
  for rule in rules.argenseg(model).rules:
    modules = [name.removesuffix(".weight") for name in rule.names()]
    wanted = [f"{m}.lora_{x}" for m in modules for x in "AB"]
    if not any(name in names for name in wanted):
      continue
    for name in wanted:
      if name not in names:
        raise WeightsError(
          f"{path / WEIGHTS} lacks tensor '{_PREFIX}{name}.weight'; its other "
          "layers have one."
        )
    used.update(wanted)
    found += _projections(
      rule,
      [source.read(names[n]).astype(np.float32) for n in wanted[::2]],
      [source.read(names[n]).astype(np.float32) for n in wanted[1::2]],
      _scaling(modules[0], values),
      path,
    )
  odd = sorted(names.keys() - used)
  if odd or not found:
    name = names[odd[0]] if odd else "nothing that is an adapter"
    raise WeightsError(
      f"{path / WEIGHTS} holds {name!r}, which adapts no projection of this "
      "base."
    )
  return found


def _module(name: str) -> str:
  """'base_model.model.language_model.x.lora_A.weight' as
  'language_model.x.lora_A'; adapters of a language model alone get its name."""
  name = name.removeprefix(_PREFIX).removesuffix(".weight")
  whole = name.startswith((_LLM, "vision_model.", "mlp1.", "word_embed"))
  return name if whole else _LLM + name


def _scaling(module: str, values: dict[str, Any]) -> tuple[int, float]:
  """Rank and scaling of a module, by PEFT's patterns."""

  def of(patterns, default):
    for pattern, value in (patterns or {}).items():
      if re.match(rf"(.*\.)?({pattern})$", module):
        return value
    return default

  rank = of(values.get("rank_pattern"), values["r"])
  alpha = of(values.get("alpha_pattern"), values["lora_alpha"])
  return int(rank), float(alpha) / int(rank)


def _projections(
  rule: Rule,
  a: list[np.ndarray],
  b: list[np.ndarray],
  scaling: tuple[int, float],
  path: pathlib.Path,
) -> Iterator[_Found]:
  rank, scale = scaling
  for left, right in zip(a, b, strict=True):
    if (
      left.ndim != 2
      or right.ndim != 2
      or {left.shape[0], right.shape[1]} != {rank}
    ):
      raise WeightsError(
        f"{path / WEIGHTS} holds lora_A {left.shape} and lora_B {right.shape} "
        f"for {rule.torch}; {CONFIG} gives it rank {rank}."
      )
  try:
    parts = [rule.transform.to_ours(x) for x in b]
  except ValueError as error:
    raise WeightsError(
      f"{path / WEIGHTS} holds lora_B {b[0].shape} for {rule.torch}, which "
      "does not fit this base."
    ) from error
  for i, ours in enumerate(rule.ours):
    left, right = [x.T for x in a], [p[i] for p in parts]
    yield _Found(
      ours.removesuffix(".kernel"),
      scale,
      np.stack(left) if rule.stack else left[0],
      np.stack(right) if rule.stack else right[0],
    )


def _of_one_rank(
  found: list[_Found],
) -> tuple[LoRAConfig, dict[str, np.ndarray]]:
  """All adapters with one rank and scaling: smaller ones get rows of zeros, and
  B takes what is left of a scaling."""
  rank = max(entry.b.shape[-2] for entry in found)
  scaling = Counter(entry.scaling for entry in found).most_common(1)[0][0]
  arrays = {}
  for entry in found:
    missing = rank - entry.b.shape[-2]
    stack = [(0, 0)] * (entry.a.ndim - 2)
    b = entry.b * np.float32(entry.scaling / scaling)
    arrays[f"{entry.path}.lora_a"] = np.pad(
      entry.a, [*stack, (0, 0), (0, missing)]
    )
    arrays[f"{entry.path}.lora_b"] = np.pad(b, [*stack, (0, missing), (0, 0)])
  config = LoRAConfig(
    rank=rank,
    alpha=scaling * rank,
    targets=tuple(entry.path for entry in found),
    train=(),
    base="bfloat16",
  )
  return config, arrays
