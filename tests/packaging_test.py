"""The package list of setup.cfg is the tree; the mapped roots import."""

import configparser
import importlib
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
MAPPED = ("configs", "kernels", "tools")


def _setup():
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  return parser


def test_package_list_matches_tree():
  found = set()
  for top in ("argenseg_jax", *MAPPED):
    for path in (ROOT / top).rglob("__init__.py"):
      parts = path.parent.relative_to(ROOT).parts
      prefix = () if top == "argenseg_jax" else ("argenseg_jax",)
      found.add(".".join(prefix + parts))
  listed = _setup()["options"]["packages"].split()
  assert sorted(found) == listed


def test_every_package_with_modules_has_an_init():
  for top in ("argenseg_jax", *MAPPED):
    for path in (ROOT / top).rglob("*.py"):
      assert (path.parent / "__init__.py").is_file(), path.parent


def test_mapped_roots_import():
  for name in MAPPED:
    module = importlib.import_module(f"argenseg_jax.{name}")
    assert pathlib.Path(module.__file__).parent == ROOT / name


def test_commands_have_modules():
  from argenseg_jax.tools.cli import COMMANDS, module_of

  for name in COMMANDS:
    module = importlib.import_module(module_of(name))
    assert callable(module.main)


def test_tools_have_one_version_each():
  for tool in ("ruff", "pyright"):
    pin = re.compile(rf"\b{tool}==([\d.]+)")
    found = {
      version
      for name in ("setup.cfg", ".ci/run", ".pre-commit-config.yaml")
      for version in pin.findall((ROOT / name).read_text())
    }
    assert len(found) == 1, (tool, found)


def test_editors_find_mapped_folders_in_a_checkout():
  """By links beside pyproject.toml, which no package carries."""
  linked = ROOT / "typings" / "argenseg_jax"
  assert {link.name for link in linked.iterdir()} == set(MAPPED)
  for link in linked.iterdir():
    assert link.resolve() == ROOT / link.name
