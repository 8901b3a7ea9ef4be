"""CONTRIBUTING.md names every test file that may skip, and no other."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
_SKIPS = re.compile(r"pytest\.(?:importorskip|skip)\(|mark\.skipif\(")


def test_what_may_skip_is_named():
  page = (ROOT / "CONTRIBUTING.md").read_text()
  named = re.findall(r"^- `(tests/\S+_test\.py)` needs", page, re.MULTILINE)
  found = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "tests").rglob("*_test.py")
    if _SKIPS.search(path.read_text())
  )
  assert named == found
