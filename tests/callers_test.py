"""Whatever is public has a caller: nothing lives for its tests alone."""

import ast
import collections
import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
TOPS = ("argenseg_jax", "kernels", "configs", "tools")
# Called by name: commands, configs, the checks of `torch_weights.parity`.
BY_NAME = {"main", "get_config", "checks"}
# Called by the libraries whose classes these methods complete.
BY_LIBRARIES = {"find_class", "reached_preemption"}


def _definitions(tree: ast.Module) -> dict[str, int]:
  """Public functions, classes, methods and constants, with their lines."""
  found = {}
  for node in tree.body:
    for name, line in _named(node):
      found[name] = line
    if isinstance(node, ast.ClassDef):
      for child in node.body:
        if isinstance(child, ast.FunctionDef):
          found[child.name] = child.lineno
  return {n: line for n, line in found.items() if not n.startswith("_")}


def _named(node: ast.stmt) -> list[tuple[str, int]]:
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    return [(node.name, node.lineno)]
  if isinstance(node, ast.Assign):
    names = [t.id for t in node.targets if isinstance(t, ast.Name)]
    return [(name, node.lineno) for name in names]
  if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
    return [(node.target.id, node.lineno)]
  return []


def _uses(tree: ast.Module) -> collections.Counter:
  """How often each name is read; an import alone is no use."""
  found = collections.Counter()
  for node in ast.walk(tree):
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
      found[node.id] += 1
    elif isinstance(node, ast.Attribute):
      found[node.attr] += 1
    elif isinstance(node, ast.Constant) and _is_dotted(node.value):
      found.update(node.value.split("."))
  return found


def _is_dotted(value: object) -> bool:
  """Whether a string is MODULE.NAME, as a registry has it."""
  return isinstance(value, str) and bool(re.fullmatch(r"\w+(\.\w+)+", value))


def _recursive(tree: ast.Module, name: str) -> int:
  """Uses of a function inside itself."""
  inside = 0
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef) and node.name == name:
      inside += _uses(ast.Module([node], []))[name]
  return inside


@functools.cache
def _trees() -> dict[pathlib.Path, ast.Module]:
  return {
    path: ast.parse(path.read_text())
    for top in TOPS
    for path in sorted((ROOT / top).rglob("*.py"))
  }


def _place(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def test_public_names_have_callers():
  uses = sum(map(_uses, _trees().values()), collections.Counter())
  pages = "".join(
    path.read_text()
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
  )
  documented = set(re.findall(r"\w+", pages))
  idle = [
    f"{_place(path)}:{line} {name}"
    for path, tree in _trees().items()
    for name, line in _definitions(tree).items()
    if uses[name] <= _recursive(tree, name)
    and name not in documented | BY_NAME | BY_LIBRARIES
  ]
  assert not idle


def test_names_are_imported_from_where_they_are_defined():
  """An `__init__` may offer what its files define; no other file passes on
  what it imports."""
  strays = []
  for path, tree in _trees().items():
    for node in ast.walk(tree):
      if not isinstance(node, ast.ImportFrom) or not node.module:
        continue
      source = _file(node.module)
      if source is None or source.name == "__init__.py":
        continue
      names = {name for n in _trees()[source].body for name, _ in _named(n)}
      strays += [
        f"{_place(path)}:{node.lineno} {node.module}.{alias.name}"
        for alias in node.names
        if alias.name not in names
      ]
  assert not strays


def _file(module: str) -> pathlib.Path | None:
  """The file of one of our modules."""
  parts = module.split(".")
  if parts[0] != "argenseg_jax":
    return None
  mapped = len(parts) > 1 and parts[1] in TOPS
  base = ROOT.joinpath(*parts[mapped:])
  for path in (base.with_suffix(".py"), base / "__init__.py"):
    if path in _trees():
      return path
  return None
