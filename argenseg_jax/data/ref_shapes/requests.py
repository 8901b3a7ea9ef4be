"""Requests over procedural scenes, split by split, as encoded records."""

import dataclasses
import functools
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import cv2
import numpy as np

from argenseg_jax.data.ref_shapes import expressions, scenes
from argenseg_jax.data.worker_signals import leave_ctrl_c_to_main

KINDS = ("attribute", "relation", "absent")
REQUESTS_PER_SCENE = 3
_JPEG_QUALITY = 92
_SCENES_PER_TASK = 64
_WORTH_PROCESSES = 5_000  # Records; fewer are drawn in this process.


@dataclasses.dataclass(frozen=True)
class Split:
  """What a split asks for.

  Attributes:
    number: part of every seed, so that splits never share a scene.
    style: what its scenes hold.
    shares: probability of each of `KINDS`; a scene without any clear relation
      gets an attribute request instead, but where only relations are asked
      for such a scene is passed over.
  """

  number: int
  style: scenes.Style
  shares: tuple[float, float, float]


# Shares of requests and of hard scenes in "train": docs/lab/quickstart.md.
SPLITS = {
  "train": Split(
    0,
    scenes.Style(
      (1, 2, 2, 3, 3), share_color=0.12, share_both=0.06, share_shape=0.08
    ),
    (0.57, 0.28, 0.15),
  ),
  # One shape a scene: finding it needs no reading.
  "single": Split(4, scenes.Style((1,)), (0.85, 0.0, 0.15)),
  "val": Split(1, scenes.Style(), (0.93, 0.0, 0.07)),
  "testA": Split(
    2,
    scenes.Style((2, 3, 4), share_color=0.35, share_both=0.15, share_shape=0.3),
    (1.0, 0.0, 0.0),
  ),
  "testB": Split(
    3, scenes.Style((2, 3), share_both=0.15, share_shape=0.3), (0.0, 1.0, 0.0)
  ),
}


def draw_requests(
  split: Split, scene_id: int, *, seed: int, image_side: int
) -> list[dict[str, Any]]:
  """The records of one scene, as a function of the arguments alone.

  Returns:
    Up to `REQUESTS_PER_SCENE` records: "image" JPEG bytes, "seg_mask" PNG
    bytes of 0 and 255 (all 0 for kind "absent"), "expressions" (one to three
    wordings of one request), "description" of the target ("small red star";
    empty for kind "absent"), "kind", "scene_id", "num_objects".
  """
  scene, drawing = scenes.draw_scene(
    (seed, split.number, scene_id), split.style, image_side
  )
  rng = np.random.default_rng((seed, split.number, scene_id, 1))
  image = _encode(".jpg", drawing.image[..., ::-1], _JPEG_QUALITY)
  targets = rng.permutation(len(scene.things))
  records = []
  for i in range(REQUESTS_PER_SCENE):
    kind = KINDS[rng.choice(len(KINDS), p=split.shares)]
    target = int(targets[i % len(targets)])
    queries: list[expressions.Query] = []
    if kind == "absent":
      queries = [expressions.absent_look(rng, scene)]
    elif kind == "relation":
      queries = list(expressions.relation_queries(scene, target))
    if not queries and split.shares[0]:
      kind = "attribute"
      queries = list(expressions.attribute_looks(scene, target))
    if not queries:
      continue
    if kind == "absent":
      seg_mask = np.zeros((image_side, image_side), np.uint8)
      description = ""
    else:
      thing = scene.things[target]
      description = f"{thing.size} {thing.color} {thing.shape}"
      seg_mask = drawing.visible[target].astype(np.uint8) * 255
    records.append(
      {
        "image": image,
        "seg_mask": _encode(".png", seg_mask),
        "expressions": _wordings(rng, queries),
        "description": description,
        "kind": kind,
        "scene_id": scene_id,
        "num_objects": len(scene.things),
      }
    )
  return records


def iterate_requests(
  split: str, count: int, *, seed: int, image_side: int, workers: int = 1
) -> Iterator[dict[str, Any]]:
  """The first `count` records of a split; the same for any `workers`.

  Processes are started only where there is enough work to repay them.
  """
  draw = functools.partial(_draw_task, split, seed, image_side)
  if workers < 2 or count < _WORTH_PROCESSES:
    tasks = map(draw, itertools.count())
    yield from itertools.islice(itertools.chain.from_iterable(tasks), count)
    return
  context = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(
    workers, mp_context=context, initializer=leave_ctrl_c_to_main
  ) as pool:
    pending = [pool.submit(draw, n) for n in range(2 * workers)]
    for task in itertools.count(len(pending)):
      records = pending.pop(0).result()
      yield from records[:count]
      count -= len(records)
      if count <= 0:
        break
      pending.append(pool.submit(draw, task))
    for future in pending:
      future.cancel()


def _draw_task(
  split: str, seed: int, image_side: int, task: int
) -> list[dict[str, Any]]:
  """The records of the `task`-th run of scenes."""
  first = task * _SCENES_PER_TASK
  return [
    record
    for scene_id in range(first, first + _SCENES_PER_TASK)
    for record in draw_requests(
      SPLITS[split], scene_id, seed=seed, image_side=image_side
    )
  ]


def _wordings(
  rng: np.random.Generator, queries: list[expressions.Query]
) -> list[str]:
  """One to three different wordings of what the queries have in common."""
  wanted = int(rng.integers(1, 4))
  words: list[str] = []
  for _ in range(3 * wanted):
    query = queries[rng.integers(len(queries))]
    text = expressions.phrase(rng, query)
    if text not in words:
      words.append(text)
    if len(words) == wanted:
      break
  return words


def _encode(extension: str, pixels: np.ndarray, quality: int = 0) -> bytes:
  options = [cv2.IMWRITE_JPEG_QUALITY, quality] if quality else []
  _, encoded = cv2.imencode(extension, np.ascontiguousarray(pixels), options)
  return encoded.tobytes()
