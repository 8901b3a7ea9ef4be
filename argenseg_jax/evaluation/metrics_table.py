"""Metrics as text, and the rules that they follow."""

from collections.abc import Mapping
from typing import Any

from argenseg_jax.evaluation.published_rules import RULES

Metrics = Mapping[str, Mapping[str, Any]]  # Data set -> metric -> value.


def text(metrics: Metrics) -> str:
  """Lines of names and values, below the name of each data set."""
  lines = []
  for name, values in metrics.items():
    lines.append(name)
    for key, value in values.items():
      if isinstance(value, list):  # Of dictionaries with equal keys.
        rows = [list(value[0]), *(row.values() for row in value)]
        lines += ["  " + " ".join(f"{_cell(v):>12}" for v in r) for r in rows]
      else:
        lines.append(f"  {key:18} {_cell(value)}")
  return "\n".join(lines)


def rules(metrics: Metrics) -> dict[str, dict[str, str]]:
  """{"rules": what each score of words follows}, where there are any."""
  found = {name for values in metrics.values() for name in values}
  named = {name: rule for name, rule in RULES.items() if name in found}
  return {"rules": named} if named else {}


def _cell(value: Any) -> str:
  return f"{value:.4f}" if isinstance(value, float) else str(value)
