"""Procedural scenes of colored shapes: drawing and what can be said of them.

Pure functions of a seed; no files, no TFDS. Places and radii are fractions of
the image's side, x to the right and y downwards.
"""

import dataclasses

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
  "red": (214, 36, 38),
  "orange": (248, 142, 24),
  "yellow": (247, 222, 48),
  "green": (40, 156, 62),
  "cyan": (70, 205, 222),
  "blue": (38, 74, 214),
  "purple": (128, 48, 168),
  "pink": (246, 134, 190),
}
# Smallest and largest radius of each size; the gaps keep the words apart.
SIZES = {
  "small": (0.14, 0.16),
  "medium": (0.2, 0.225),
  "large": (0.28, 0.31),
}
# Grounds have little saturation, so that no shape's color occurs in them.
GROUND_COLORS = (
  (236, 236, 236),
  (204, 204, 200),
  (226, 216, 198),
  (170, 176, 186),
  (122, 124, 128),
  (92, 86, 80),
  (58, 60, 66),
  (28, 28, 32),
)
GROUNDS = ("plain", "gradient", "stripes", "checker", "noise")
_SUPERSAMPLING = 4
_MIN_VISIBLE = 0.65  # Share of a shape that shapes on top of it must leave.


@dataclasses.dataclass(frozen=True)
class Thing:
  """One shape of a scene."""

  shape: str
  color: str
  size: str
  x: float
  y: float
  radius: float
  angle: float  # Radians.


@dataclasses.dataclass(frozen=True)
class Scene:
  """Shapes from back to front on a ground."""

  things: tuple[Thing, ...]
  ground: str
  ground_colors: tuple[tuple[int, int, int], tuple[int, int, int]]
  texture_seed: int


@dataclasses.dataclass(frozen=True)
class Style:
  """What `draw_scene` may put into a scene.

  Attributes:
    counts: possible numbers of shapes, each equally likely.
    share_color: probability that two shapes have the same color but not the
      same form, so that a request needs both words.
    share_both: probability that two shapes differ in nothing but size.
    share_shape: probability that two shapes have the same form but not the
      same color (it happens by chance too).
  """

  counts: tuple[int, ...] = (1, 2, 3)
  share_color: float = 0.08
  share_both: float = 0.04
  share_shape: float = 0.0


def make_scene(rng: np.random.Generator, style: Style) -> Scene:
  """Draws the looks and the places of a scene's shapes.

  A shape that finds no free place is left out, so a scene may hold fewer
  shapes than asked for, but never none.
  """
  count = int(rng.choice(style.counts))
  looks = _looks(rng, count, style)
  touching = 0.8 if rng.random() < 0.12 else 1.08
  things: list[Thing] = []
  for shape, color, size in looks:
    radius = float(rng.uniform(*SIZES[size]))
    for _ in range(40):
      x, y = rng.uniform(radius + 0.01, 0.99 - radius, 2)
      if all(
        np.hypot(x - t.x, y - t.y) > touching * (radius + t.radius)
        for t in things
      ):
        turn = float(rng.uniform(-0.2, 0.2))
        things.append(
          Thing(shape, color, size, float(x), float(y), radius, turn)
        )
        break
  first, second = rng.choice(len(GROUND_COLORS), 2, replace=False)
  return Scene(
    things=tuple(things),
    ground=str(rng.choice(GROUNDS)),
    ground_colors=(GROUND_COLORS[first], GROUND_COLORS[second]),
    texture_seed=int(rng.integers(2**31)),
  )


def _looks(rng, count, style) -> list[tuple[str, str, str]]:
  """Form, color and size of each shape; no two are alike in all three."""
  colors = [str(c) for c in rng.permutation(list(COLORS))[:count]]
  shapes = [str(s) for s in rng.choice(SHAPES, count)]
  sizes = [str(s) for s in rng.choice(list(SIZES), count)]
  if count > 1:
    chance = rng.random()
    if chance < style.share_both:
      colors[1], shapes[1] = colors[0], shapes[0]
      sizes[:2] = [str(s) for s in rng.permutation(["small", "large"])]
    elif chance < style.share_both + style.share_color:
      colors[1] = colors[0]
      others = [s for s in SHAPES if s != shapes[0]]
      shapes[1] = str(rng.choice(others))
    elif chance < style.share_both + style.share_color + style.share_shape:
      shapes[1] = shapes[0]
  return list(zip(shapes, colors, sizes, strict=True))


def _outline(thing: Thing) -> list[np.ndarray]:
  """Closed contours [n 2] around the origin at radius 1; a second one is a
  hole."""

  def polygon(sides, start, radius=1.0):
    angles = start + 2 * np.pi * np.arange(sides) / sides
    return radius * np.stack((np.cos(angles), np.sin(angles)), -1)

  if thing.shape == "circle":
    return [polygon(48, 0)]
  if thing.shape == "ring":
    return [polygon(48, 0), polygon(48, 0, 0.52)]
  if thing.shape == "square":
    return [polygon(4, np.pi / 4)]
  if thing.shape == "triangle":
    return [polygon(3, -np.pi / 2)]
  if thing.shape == "star":
    points = np.empty((10, 2))
    points[0::2] = polygon(5, -np.pi / 2)
    points[1::2] = polygon(5, -np.pi / 2 + np.pi / 5, 0.45)
    return [points]
  a, b = 0.96, 0.32  # Half length and half width of the cross's bars.
  corners = [(b, a), (b, b), (a, b), (a, -b), (b, -b), (b, -a)]
  return [np.array(corners + [(-x, -y) for x, y in corners])]


def _coverage(thing: Thing, side: int) -> np.ndarray:
  """Share of each pixel that the shape covers, float32 [side side]."""
  # Only the shape's own square is drawn: most of the image stays empty.
  reach = thing.radius + 2 / side
  left, top = (max(int((c - reach) * side), 0) for c in (thing.x, thing.y))
  right, bottom = (
    min(int((c + reach) * side) + 1, side) for c in (thing.x, thing.y)
  )
  big = side * _SUPERSAMPLING
  cos, sin = np.cos(thing.angle), np.sin(thing.angle)
  turn = np.array(((cos, sin), (-sin, cos)))
  center = np.array((thing.x - left / side, thing.y - top / side))
  contours = [
    np.round((c @ turn * thing.radius + center) * big * 16 - 8).astype(np.int32)
    for c in _outline(thing)
  ]
  width, height = right - left, bottom - top
  canvas = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
  cv2.fillPoly(canvas, contours, 255, shift=4)
  small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
  coverage = np.zeros((side, side), np.float32)
  coverage[top:bottom, left:right] = small / np.float32(255)
  return coverage


def _draw_ground(scene: Scene, side: int) -> np.ndarray:
  """Float32 [side side 3] in 0..255."""
  rng = np.random.default_rng(scene.texture_seed)
  first, second = (np.array(c, np.float32) for c in scene.ground_colors)
  contrast = rng.uniform(0.25, 0.9)
  second = first + contrast * (second - first)
  angle = rng.uniform(0, np.pi)
  ramp = np.arange(side, dtype=np.float32) / side
  along = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
  if scene.ground == "gradient":
    low, high = along.min(), along.max()
    mix = (along - low) / (high - low)
  elif scene.ground == "stripes":
    mix = (along * rng.uniform(4, 12)) % 1 > 0.5
  elif scene.ground == "checker":
    cells = np.floor(ramp * rng.integers(3, 9)).astype(np.int32)
    mix = (cells[:, None] + cells[None]) % 2
  else:
    mix = np.zeros((side, side))
  mix = np.asarray(mix, np.float32)[..., None]
  ground = first + mix * (second - first)
  if scene.ground == "noise":
    ground = ground + rng.normal(0, 10, (side, side, 1)).astype(np.float32)
  return ground


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A rendered scene.

  Attributes:
    image: uint8 [side side 3], RGB.
    visible: bool [things side side], the pixels of each shape that no other
      shape covers.
    shown: float [things], the share of each shape that is visible.
  """

  image: np.ndarray
  visible: np.ndarray
  shown: np.ndarray


def render(scene: Scene, side: int) -> Drawing:
  """Draws a scene's shapes from back to front."""
  image = _draw_ground(scene, side)
  whole = np.zeros((len(scene.things), side, side), bool)
  visible = whole.copy()
  tints = np.random.default_rng(scene.texture_seed + 1)
  for i, thing in enumerate(scene.things):
    cover = _coverage(thing, side)
    tint = np.array(COLORS[thing.color]) + tints.uniform(-8, 8, 3)
    alpha = cover[..., None]
    image = image * (1 - alpha) + alpha * tint.astype(np.float32)
    whole[i] = visible[i] = cover >= 0.5
    visible[:i] &= ~whole[i]
  return Drawing(
    image=np.clip(np.round(image), 0, 255).astype(np.uint8),
    visible=visible,
    shown=visible.sum((1, 2)) / whole.sum((1, 2)),
  )


def draw_scene(
  seed: tuple[int, ...], style: Style, side: int
) -> tuple[Scene, Drawing]:
  """A scene and its drawing, as a function of the seed.

  Scenes in which one shape is mostly hidden are drawn again.
  """
  rng = np.random.default_rng(seed)
  while True:
    scene = make_scene(rng, style)
    drawing = render(scene, side)
    if drawing.shown.min() >= _MIN_VISIBLE:
      return scene, drawing
