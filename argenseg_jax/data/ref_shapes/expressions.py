"""What can be said of a scene, and an evaluator that says what is meant.

A query is a predicate over a scene's shapes. `resolve` names the one shape a
query means, and returns None where it means none, several, or where the answer
would hang on a hair.
"""

import dataclasses

import numpy as np

from argenseg_jax.data.ref_shapes.scenes import COLORS, SHAPES, Scene, Thing

# Two places closer than this are neither left nor right of one another.
_CLEAR = 0.07


@dataclasses.dataclass(frozen=True)
class Look:
  """Shapes that have every attribute given; None admits all."""

  shape: str | None = None
  color: str | None = None
  size: str | None = None


@dataclasses.dataclass(frozen=True)
class Beside:
  """Shapes of a look on one side of the only shape that looks like `anchor`."""

  what: Look
  side: str  # A key of `_SIDES`.
  anchor: Look


@dataclasses.dataclass(frozen=True)
class Outermost:
  """The shape of a look that lies furthest to one side."""

  what: Look
  side: str


Query = Look | Beside | Outermost

# Axis, direction, words between two shapes, superlative.
_SIDES = {
  "left": ("x", -1, "left of", "leftmost"),
  "right": ("x", 1, "right of", "rightmost"),
  "above": ("y", -1, "above", "topmost"),
  "below": ("y", 1, "below", "lowest"),
}


def find(scene: Scene, query: Query, margin: float = 0.0) -> frozenset[int]:
  """Indices of the shapes that a query admits.

  Args:
    margin: how far a shape must lie to the side that a query names; below zero
      it may even lie a little on the other side.
  """
  things = scene.things
  if isinstance(query, Look):
    return frozenset(i for i, t in enumerate(things) if _looks_like(t, query))
  axis, sign, _, _ = _SIDES[query.side]
  place = [sign * getattr(t, axis) for t in things]
  candidates = find(scene, query.what)
  if isinstance(query, Outermost):
    return frozenset(
      i
      for i in candidates
      if all(place[i] > place[j] + margin for j in candidates if j != i)
    )
  anchors = find(scene, query.anchor)
  if len(anchors) != 1:
    return frozenset()
  (anchor,) = anchors
  return frozenset(
    i for i in candidates - anchors if place[i] > place[anchor] + margin
  )


def _looks_like(thing: Thing, look: Look) -> bool:
  return (
    look.shape in (None, thing.shape)
    and look.color in (None, thing.color)
    and look.size in (None, thing.size)
  )


def resolve(scene: Scene, query: Query) -> int | None:
  """The only shape that a query can mean, judged strictly and leniently."""
  strict = find(scene, query, _CLEAR)
  if len(strict) != 1 or strict != find(scene, query, -_CLEAR):
    return None
  (index,) = strict
  return index


def is_absent(scene: Scene, query: Query) -> bool:
  """Whether no shape can be meant, even leniently."""
  return not find(scene, query, -_CLEAR)


def attribute_looks(scene: Scene, index: int) -> list[Look]:
  """Looks that single out a shape, without words it does not need.

  The size is named only where form and color do not suffice.
  """
  t = scene.things[index]
  looks = [
    Look(t.shape, t.color),
    Look(None, t.color),
    Look(t.shape),
  ]
  clear = [q for q in looks if resolve(scene, q) == index]
  if not clear and t.size != "medium":
    sized = Look(t.shape, t.color, t.size)
    clear = [sized] if resolve(scene, sized) == index else []
  return clear


def relation_queries(scene: Scene, index: int) -> list[Beside | Outermost]:
  """Clear queries that find a shape by its place and not without it."""
  t = scene.things[index]
  whats = [Look(), Look(t.shape), Look(t.shape, t.color)]
  if t.size != "medium":
    whats.append(Look(t.shape, t.color, t.size))
  queries: list[Beside | Outermost] = []
  for side in _SIDES:
    if len(scene.things) > 1:
      queries += [Outermost(w, side) for w in whats if len(find(scene, w)) > 1]
    for j, other in enumerate(scene.things):
      if j != index:
        anchors = [Look(other.shape, other.color), Look(other.shape)]
        queries += [
          Beside(w, side, a)
          for w in whats
          for a in anchors
          if len(find(scene, w)) > 1
        ]
  return [q for q in queries if resolve(scene, q) == index]


def absent_look(rng: np.random.Generator, scene: Scene) -> Look:
  """A look that no shape of the scene has; half of the time it shares the form
  or the color of one."""
  things = scene.things
  while True:
    look = Look(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))))
    if rng.random() < 0.5:
      thing = things[rng.integers(len(things))]
      keep = rng.choice(["shape", "color"])
      look = dataclasses.replace(look, **{str(keep): getattr(thing, keep)})
    elif rng.random() < 0.3:
      look = Look(None, look.color)
    if is_absent(scene, look):
      return look


def phrase(rng: np.random.Generator, query: Query) -> str:
  """Puts a query into words, in one of several ways."""
  if isinstance(query, Look):
    words = _noun(rng, query)
    chance = rng.random()
    if query.shape and query.color and not query.size and chance < 0.15:
      return f"the {query.shape} that is {query.color}"
    return words if chance > 0.9 else f"the {words}"
  _, _, between, superlative = _SIDES[query.side]
  if isinstance(query, Outermost):
    return f"the {superlative} {_noun(rng, query.what)}"
  what, anchor = _noun(rng, query.what), _noun(rng, query.anchor)
  if between.endswith("of") and rng.random() < 0.3:
    between = f"to the {between}"
  return f"the {what} {between} the {anchor}"


def _noun(rng: np.random.Generator, look: Look) -> str:
  form = look.shape
  if form is None:
    form = "shape" if look.color is None or rng.random() < 0.5 else "one"
  return " ".join(w for w in (look.size, look.color, form) if w)
