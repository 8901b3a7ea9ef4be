"""`argenseg parity`: which kind of golden a folder is, and all its verdicts."""

import dataclasses
import importlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from argenseg_jax.config import ConfigError
from argenseg_jax.torch_weights.parity.compare import (
  Check,
  Golden,
  Verdict,
  compare,
  failed,
)
from argenseg_jax.torch_weights.tensors import WeightsError

KINDS = ("vqvae", "internvit", "internlm2", "argenseg", "preprocess")


def kind_of(golden: Golden) -> str:
  """From the `set` key of config.json, else from what the folder holds.

  Raises:
    WeightsError: neither tells.
  """
  name = str(golden.config.get("set", "")).removeprefix("set_")
  if name in KINDS:
    return name
  if not (golden.path / "weights.safetensors").is_file():
    if "conversations" in golden.config:
      return "preprocess"
    raise WeightsError(f"{golden.path} contains no weights.safetensors.")
  tensors = golden.weights.tensors
  for kind, tensor in (
    ("argenseg", "word_embed.weight"),
    ("vqvae", "quantize.embedding.weight"),
    ("internvit", "vision_model.embeddings.class_embedding"),
    ("internlm2", "model.norm.weight"),
  ):
    if tensor in tensors:
      return kind
  raise WeightsError(f"{golden.path} is no golden folder that parity knows.")


def parity(
  path: str | pathlib.Path,
) -> tuple[dict[str, Verdict], dict[str, str]]:
  """Compares every `out.*` array of a golden folder.

  Returns:
    Verdicts by array, and reasons by array that was not compared.

  Raises:
    WeightsError: the folder or its weights cannot be used.
  """
  golden = Golden.open(path)
  module = importlib.import_module(
    f"argenseg_jax.torch_weights.parity.{kind_of(golden)}"
  )
  try:
    checks = module.checks(golden)
  except (WeightsError, ConfigError):
    raise
  except Exception as error:  # An input is missing or of a strange shape.
    broken = failed(error)
    return dict.fromkeys(golden.recorded, broken), {}
  verdicts, skipped = {}, {}
  for name, recorded in golden.recorded.items():
    check = checks.get(name) or thinned(name, checks)
    if check is not None:
      verdicts[name] = compare(name, recorded, check)
    else:
      skipped[name] = "parity knows no such array"
  return verdicts, skipped


def thinned(name: str, checks: Mapping[str, Check]) -> Check | None:
  """The check of an array that a recorder thinned out.

  `X_every16` is X at each 16th position (axis 1), `X_sub4` each 4th row and
  column (the last two axes).
  """
  match = re.fullmatch(r"(.+)_(every|sub)([1-9]\d*)", name)
  if match is None or match[1] not in checks:
    return None
  whole, step = checks[match[1]], slice(None, None, int(match[3]))
  index = (slice(None), step) if match[2] == "every" else (..., step, step)
  return dataclasses.replace(
    whole, compute=lambda: np.asarray(whole.compute())[index]
  )


def as_json(
  verdicts: dict[str, Verdict], skipped: dict[str, str]
) -> dict[str, Any]:
  """The report as plain values; infinite errors become null."""
  compared = {}
  for name, verdict in verdicts.items():
    finite = verdict.max_abs < float("inf")
    entry = {
      "max_abs": verdict.max_abs if finite else None,
      "max_rel": verdict.max_rel if finite else None,
      "ok": verdict.ok,
    }
    if verdict.error:
      entry["error"] = verdict.error
    compared[name] = entry
  return {"compared": compared, "not_compared": skipped}
