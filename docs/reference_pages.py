"""mkdocs hook: pages of the reference that are made from the code itself."""

import contextlib
import importlib
import io
import pathlib

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent
_SUBCOMMANDS = ("bench", "data")
# What users call; everything else is for those who read the sources.
_PYTHON = (
  "argenseg_jax.inference.predictor.Predictor",
  "argenseg_jax.inference.predictor.Picture",
  "argenseg_jax.inference.segment.Prediction",
  "argenseg_jax.checkpoint.load.load",
  "argenseg_jax.training.loop.run",
)


def on_files(files, config):
  """Adds the pages."""
  for name, text in (
    ("commands", _commands()),
    ("config", _config()),
    ("python", _python()),
  ):
    files.append(File.generated(config, f"reference/{name}.md", content=text))
  return files


def _help(command: str, *names: str) -> str:
  from argenseg_jax.tools.cli import module_of

  printed = io.StringIO()
  module = importlib.import_module(module_of(command))
  with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
    module.main([*names, "--help"])
  text = printed.getvalue().rstrip()
  if not text:
    raise ValueError(f"argenseg {command} {' '.join(names)} has no --help")
  return text


def _commands() -> str:
  from argenseg_jax.tools.cli import COMMANDS

  parts = ["# Commands\n\nWhat `argenseg COMMAND --help` prints.\n"]
  for command, line in COMMANDS.items():
    parts.append(f"## {command}\n\n{line}\n\n```text\n{_help(command)}\n```\n")
    if command in _SUBCOMMANDS:
      package = importlib.import_module(f"argenseg_jax.tools.{command}")
      names = getattr(package, "BENCHES", None) or package.ACTIONS
      parts += [
        f"### {command} {name}\n\n```text\n{_help(command, name)}\n```\n"
        for name in names
      ]
  return "\n".join(parts)


def _config() -> str:
  source = (_ROOT / "configs" / "base.py").read_text()
  return (
    "# Config keys\n\nEvery key, its default and what it means, as "
    "`configs/base.py` has them. Change them on the command line: "
    f"`--config.mllm.train.steps=100`.\n\n```python\n{source}```\n"
  )


def _python() -> str:
  parts = [
    "# Python\n\nWhat programs call. `from argenseg_jax import Predictor`."
  ]
  parts += [f"::: {name}" for name in _PYTHON]
  return "\n\n".join(parts) + "\n"
