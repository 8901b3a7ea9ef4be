"""Imports point down CONTRIBUTING.md's list of files: the whole tree."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOPS = ("argenseg_jax", "kernels", "configs", "tools")


def _map() -> list[str]:
  """Modules as CONTRIBUTING.md lists them, top to bottom."""
  rows = re.findall(
    r"^\| `([\w/]+)(?:\.py)?` \|.*\| (.*) \|$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.MULTILINE,
  )
  modules = []
  for wing, listed in rows:
    parts = wing.rstrip("/").split("/")
    if parts[-1] in listed.split() and (ROOT / f"{wing}.py").exists():
      parts.pop()  # A file that is a wing of its own.
    for group in re.findall(r"[\w/]+\{[^}]*\}|\w+", listed):
      folder, _, names = group.rpartition("/{")
      for name in names.rstrip("}").split():
        path = [*parts, *folder.split("/"), name]
        if not folder:
          path = [*parts, name]
        if path[-2:-1] == path[-1:]:
          path.pop()  # The wing's own `__init__`.
        modules.append(_dotted(path))
  return modules


def _dotted(parts: list[str]) -> str:
  return ".".join(
    parts if parts[0] == "argenseg_jax" else ["argenseg_jax", *parts]
  )


def _tree() -> dict[str, pathlib.Path]:
  """Modules that hold code."""
  found = {}
  for top in TOPS:
    for path in sorted((ROOT / top).rglob("*.py")):
      parts = list(path.relative_to(ROOT).with_suffix("").parts)
      if parts[-1] == "__init__":
        parts.pop()
      if path.name == "__init__.py" and (
        len(_parsed(path).body) < 2 or parts == ["argenseg_jax"]
      ):
        continue  # Nothing but a docstring, or the face of everything.
      found[_dotted(parts)] = path
  return found


def _parsed(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text())


def _imports(path: pathlib.Path):
  for node in ast.walk(_parsed(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f"{node.module}.{alias.name}"


MAP, TREE = _map(), _tree()


def test_the_map_is_the_tree():
  assert len(MAP) == len(set(MAP))
  assert sorted(MAP) == sorted(TREE)


@pytest.mark.parametrize("module", TREE)
def test_imports_point_down(module):
  """Strictly: neither up, nor to itself, so that no circle can be."""
  for name in _imports(TREE[module]):
    imported = name if name in TREE else name.rpartition(".")[0]
    if imported in TREE:
      assert MAP.index(imported) < MAP.index(module), imported


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
