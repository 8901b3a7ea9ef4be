"""Imports point down: a module may import only what stands above it."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Top to bottom. A module's layer is the longest prefix that matches it.
LAYERS = [
  ("argenseg_jax.kernels",),
  (
    "argenseg_jax.compilation_cache",
    "argenseg_jax.version",
    "argenseg_jax.scales",
    "argenseg_jax.types",
  ),
  ("argenseg_jax.config",),
  (
    "argenseg_jax.boxes",
    "argenseg_jax.bucket_lock",
    "argenseg_jax.distributed",
    "argenseg_jax.files",
    "argenseg_jax.integrity",
    "argenseg_jax.lock",
    "argenseg_jax.mirror",
    "argenseg_jax.stopping",
    "argenseg_jax.topology",
    "argenseg_jax.watchdog",
    "argenseg_jax.workdir",
  ),
  ("argenseg_jax.cpu", "argenseg_jax.sharding"),
  ("argenseg_jax.data",),
  ("argenseg_jax.models",),
  (
    "argenseg_jax.choice",
    "argenseg_jax.flops",
    "argenseg_jax.goodput",
    "argenseg_jax.hlo",
    "argenseg_jax.losses",
    "argenseg_jax.metrics",
    "argenseg_jax.monitor",
    "argenseg_jax.non_finite",
    "argenseg_jax.optimizer",
    "argenseg_jax.sampling",
    "argenseg_jax.scores",
    "argenseg_jax.tokenizer_training",
  ),
  ("argenseg_jax.bootstrap", "argenseg_jax.understanding"),
  ("argenseg_jax.predictions",),
  ("argenseg_jax.checkpoint",),
  (
    "argenseg_jax.starting",
    "argenseg_jax.torch_weights",
    "argenseg_jax.train_state",
  ),
  ("argenseg_jax.parity",),
  (
    "argenseg_jax.answering",
    "argenseg_jax.engine",
    "argenseg_jax.mask_codes",
    "argenseg_jax.predict",
    "argenseg_jax.prompts",
    "argenseg_jax.rows",
    "argenseg_jax.train_step",
  ),
  ("argenseg_jax.drawing", "argenseg_jax.grounding", "argenseg_jax.report"),
  ("argenseg_jax.evaluate",),
  ("argenseg_jax.evaluation_report", "argenseg_jax.tokenizer_eval"),
  ("argenseg_jax.contact_sheet",),
  ("argenseg_jax.speed", "argenseg_jax.train_batches", "argenseg_jax.upkeep"),
  ("argenseg_jax.plan", "argenseg_jax.train"),
  ("argenseg_jax.quickstart", "argenseg_jax.configs"),
  ("argenseg_jax.tools",),
]


def _layer(module: str) -> int:
  fitting = [
    (len(prefix), index)
    for index, group in enumerate(LAYERS)
    for prefix in group
    if module == prefix or module.startswith(prefix + ".")
  ]
  assert fitting, f"{module} belongs to no layer; add it to LAYERS"
  return max(fitting)[1]


def _modules():
  for top in ("argenseg_jax", "kernels", "configs", "tools"):
    for path in sorted((ROOT / top).rglob("*.py")):
      parts = list(path.relative_to(ROOT).with_suffix("").parts)
      if parts[-1] == "__init__":
        parts.pop()
      if top != "argenseg_jax":
        parts.insert(0, "argenseg_jax")
      if parts != ["argenseg_jax"]:
        yield path, ".".join(parts)


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize(("path", "module"), list(_modules()))
def test_imports_point_down(path, module):
  for name in _imports(path):
    if not name.startswith("argenseg_jax."):
      continue
    assert _layer(name) <= _layer(module), f"{module} imports {name}"


def test_kernels_import_jax_only():
  allowed = ("jax", "jaxtyping", "numpy", "argenseg_jax.kernels")
  for path in (ROOT / "kernels").rglob("*.py"):
    for name in _imports(path):
      top = name.split(".")[0]
      assert top in sys.stdlib_module_names or name.startswith(allowed), (
        f"{path}: {name}"
      )


def test_data_never_imports_jax():
  for path in (ROOT / "argenseg_jax" / "data").rglob("*.py"):
    for name in _imports(path):
      assert name.split(".")[0] not in ("jax", "flax"), f"{path}: {name}"
