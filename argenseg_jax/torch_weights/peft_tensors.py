"""Tensors of the adapters that PyTorch's `peft` writes, and ours.

Modules have the authors' names. Where their module holds several of our
projections (InternLM2's `wqkv`), its A stacks ours and its B has a block for
each, or they share one A, as they do after import.
"""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from argenseg_jax.config import LoRAConfig
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.torch_weights import rules, tensors
from argenseg_jax.torch_weights.tables import Rule
from argenseg_jax.torch_weights.tensors import WeightsError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LLM = "language_model."

Pair = tuple[np.ndarray, np.ndarray]  # A [in rank], B [rank out], or stacks.


def adapter_pairs(
  rule: Rule, leaves: dict[str, np.ndarray]
) -> list[Pair | None]:
  """Adapters of a rule's projections; None for one without."""
  found: list[Pair | None] = []
  for path in rule.ours:
    stem = path.removesuffix(".kernel")
    a, b = leaves.get(f"{stem}.lora_a"), leaves.get(f"{stem}.lora_b")
    if stem == path or a is None or b is None:
      found.append(None)  # No kernel, or none that is adapted.
    else:
      found.append((a, b))
  return found


def at_layer(rule: Rule, pair: Pair | None, layer: int) -> Pair | None:
  """One layer's adapter from a rule's."""
  if pair is None or not rule.stack:
    return pair
  a, b = pair
  return a[layer], b[layer]


def module_tensors(rule: Rule, pairs: list[Pair | None]) -> Pair:
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


@dataclasses.dataclass(frozen=True)
class Found:
  """Adapters of one of our projections, as PEFT had them."""

  path: str  # Of the projection.
  scaling: float
  a: np.ndarray  # [in rank], or a stack.
  b: np.ndarray  # [rank out], or a stack.


def read_adapters(
  source: tensors.Source,
  values: dict[str, Any],
  model: ModelConfig,
  path: pathlib.Path,
) -> list[Found]:
  """Adapters of every projection; each tensor is used once.

  Raises:
    WeightsError: one is missing, unexpected or of another shape.
  """
  names = {_module(name): name for name in source.tensors}
  used: set[str] = set()
  found: list[Found] = []
  for rule in rules.argenseg(model).rules:
    modules = [name.removesuffix(".weight") for name in rule.names()]
    wanted = [f"{m}.lora_{x}" for m in modules for x in "AB"]
    if not any(name in names for name in wanted):
      continue
    for name in wanted:
      if name not in names:
        raise WeightsError(
          f"{path / WEIGHTS} lacks tensor '{PREFIX}{name}.weight'; its other "
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
  name = name.removeprefix(PREFIX).removesuffix(".weight")
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
) -> Iterator[Found]:
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
    yield Found(
      ours.removesuffix(".kernel"),
      scale,
      np.stack(left) if rule.stack else left[0],
      np.stack(right) if rule.stack else right[0],
    )


def with_one_rank(
  found: list[Found],
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
