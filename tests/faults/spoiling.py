"""Strategies that spoil JSON documents and bytes a little."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

_HUGE = [2**31, -(2**31) - 1, 2**63, 10**400, -1, 0, 1e308, float("nan")]
_HUGE += [float("inf"), True, "", "../x", "/etc/passwd", "a\0b", "\ud800"]
_JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.floats()
  | st.text(max_size=5)
  | st.sampled_from(_HUGE),
  lambda inner: st.lists(inner, max_size=4)
  | st.dictionaries(st.text(max_size=4), inner, max_size=3),
  max_leaves=6,
)


@st.composite
def edited(draw, document: Any) -> Any:
  """A JSON document of which one or two places hold something else."""
  document = copy.deepcopy(document)
  for _ in range(draw(st.integers(1, 2))):
    node, parent, key = document, None, None
    while isinstance(node, (dict, list)) and node:
      if parent is not None and draw(st.integers(0, 3)) == 0:
        break
      keys = list(node) if isinstance(node, dict) else range(len(node))
      parent, key = node, draw(st.sampled_from(list(keys)))
      node = parent[key]
    if parent is None:
      return draw(_JSON)
    if draw(st.booleans()):
      parent[key] = draw(_JSON)
    else:
      del parent[key]
  return document


@st.composite
def mutated(draw, raw: bytes) -> bytes:
  """Some bytes of `raw` changed, put in, taken out or said twice."""
  data = bytearray(raw)
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, len(data)))
    length = draw(st.integers(0, 8))
    change = draw(st.integers(0, 4))
    if change == 0:
      data[at : at + length] = draw(st.binary(max_size=8))
    elif change == 1 and at < len(data):
      data[at] ^= 1 << draw(st.integers(0, 7))
    elif change == 2:
      del data[at : at + length]
    elif change == 3:
      data[at:at] = data[at : at + 4 * length]
    else:
      del data[at:]
  return bytes(data)


@st.composite
def spoiled(draw, raw: bytes) -> bytes:
  """A JSON file with other values, or with other bytes."""
  if draw(st.integers(0, 3)) == 0:
    return draw(mutated(raw))
  return json.dumps(draw(edited(json.loads(raw)))).encode()
