"""No file and no function grows past what one reads at a sitting."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOPS = ("argenseg_jax", "kernels", "configs", "tools")
MOST_LINES = 400
MOST_LINES_PALLAS = 600  # Kernels, and what they share.
MOST_LINES_FUNCTION = 80  # Not of configs and kernels.


def _files(*tops: str) -> list[pathlib.Path]:
  return [p for top in tops for p in sorted((ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("top", TOPS)
def test_files_are_short(top):
  most = MOST_LINES_PALLAS if top == "kernels" else MOST_LINES
  lengths = {
    str(path.relative_to(ROOT)): len(path.read_text().splitlines())
    for path in _files(top)
  }
  assert {n: count for n, count in lengths.items() if count > most} == {}


def test_functions_are_short():
  long = {
    f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": length
    for path in _files("argenseg_jax", "tools")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    and (length := node.end_lineno - node.lineno + 1) > MOST_LINES_FUNCTION
  }
  assert long == {}
