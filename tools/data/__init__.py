"""`argenseg data NAME`: data before a run, one module an action."""

from argenseg_jax.tools import common

# Name -> what `argenseg data --help` says of it.
ACTIONS = {
  "check": "read a whole source; name every fault and count what it contains",
  "build": "pack a source into ArrayRecord files",
  "tokenize": "turn a source's masks into image codes, once",
  "show": "draw records as a model gets them",
}
_NOTES = """\
A source is LAYOUT=PATH with a layout of docs/data.md, or what a config
names: --config=FILE [--config.data.KEY=VALUE ...].

example: argenseg data check refer=refcoco jsonl=chat.jsonl"""


def main(argv: list[str]) -> int:
  """Runs an action; returns the exit code (2 for bad input)."""
  return common.dispatch(
    "data",
    "look at data and prepare it for a run.",
    ACTIONS,
    argv,
    notes=_NOTES,
  )
