"""The page of an evaluation: numbers, distributions, and answers to look at."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import matplotlib
import numpy as np
from flax import nnx

from argenseg_jax import sharding
from argenseg_jax.data import pipeline
from argenseg_jax.data.example_builder import stack_rows
from argenseg_jax.evaluation import records
from argenseg_jax.evaluation.evaluator import Evaluator, SplitResults
from argenseg_jax.inference.segment import to_uint8
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.runtime import distributed
from argenseg_jax.visualize import render

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

# Upper ends of the bars: objects by their share of the image, requests by
# their words.
_SIZES = (0.01, 0.02, 0.04, 0.08, 0.16, 1.0)
_WORDS = (1, 2, 3, 4, 6, 9, 99)
_COLOR = "#4477aa"
_LEGEND = (
  "Each line below shows an image, what was asked for, the answer, and the "
  "answer's mask image after each scale of the token map."
)
_EACH = 4  # Best, worst and random answers.
_FIRST = 6  # Masks of a validation.


def write(
  path: pathlib.Path,
  *,
  title: str,
  splits: Mapping[str, SplitResults],
  evaluator: Evaluator,
  state: nnx.State,
  tables: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> list[render.Shown]:
  """Writes a self-contained page; every process must call this.

  Args:
    path: of the page.
    title: its heading.
    splits: data sets by name, as `evaluator` scored them.
    evaluator: answers the chosen samples once more, for their scales.
    state: variables of the model.
    tables: further ones: heading -> row -> column -> value.

  Returns:
    The best, the worst and a random answer of each data set.
  """
  metrics = {name: split.metrics for name, split in splits.items()}
  parts = [render.heading("Metrics"), render.table(_turned(metrics))]
  for name, rows in (tables or {}).items():
    parts += [render.heading(name), render.table(rows)]
  some = []
  for name, split in splits.items():
    parts.append(render.heading(name))
    masks = [r for r in split.records if "mask" in r]
    if masks:
      parts += [
        render.wide_image(distributions(masks)),
        render.heading("What was answered to what", 3),
        render.table(confusion(masks)),
      ]
      parts.append(render.paragraph(_LEGEND))
      chosen = choose(masks)
      shown = _with_strips(
        [r for part in chosen.values() for r in part], split, evaluator, state
      )
      for which, part in chosen.items():
        own, shown = shown[: len(part)], shown[len(part) :]
        parts.append(render.heading(f"{name}: {which}", 3))
        parts += [render.example(row) for row in own]
        some += own[:1]
    words = [r for r in split.records if "answers" in r]
    if words:
      parts += [
        render.heading(f"{name}: answers in words", 3),
        render.table(_questions(words)),
      ]
  if distributed.is_main():
    render.write_html(path, title=title, parts=parts)
  return some


def draw_first(split: SplitResults, path: pathlib.Path) -> bool:
  """Writes a PNG of the first masks of a split, each of another image.

  Args:
    split: that was scored.
    path: of the PNG.

  Returns:
    Whether there was any mask to draw.
  """
  masks = [r for r in split.records if "mask" in r]
  first = {r["picture"]: r for r in reversed(masks)}
  chosen = list(reversed(first.values()))[:_FIRST]
  if chosen:
    none = np.zeros((0, 1, 1, 3), np.uint8)
    render.draw_rows([_shown(r, split.rows, none, ()) for r in chosen], path)
  return bool(chosen)


def choose(
  masks: Sequence[dict[str, Any]], count: int = _EACH
) -> dict[str, list[dict[str, Any]]]:
  """The best, the worst and some other answers, each of another image.

  Args:
    masks: records with a mask and its IoU.
    count: of each sort.
  """
  # Two empty masks agree wholly, but there is nothing to see.
  seen = [r for r in masks if records.pixels(r["truth"]).any()] or masks
  ranked = sorted(seen, key=lambda r: -r["iou"])
  order = np.random.default_rng(0).permutation(len(masks))
  found, seen_images = {}, set()
  for name, candidates in (
    ("best", ranked),
    ("worst", ranked[::-1]),
    ("random", [masks[i] for i in order]),
  ):
    part = []
    for record in candidates:
      if len(part) < count and record["picture"] not in seen_images:
        part.append(record)
        seen_images.add(record["picture"])
    if part:
      found[name] = part
  return found


def confusion(
  masks: Sequence[dict[str, Any]],
) -> dict[str, dict[str, int]]:
  """How many requests with and without a target got which sort of answer."""
  columns: tuple[str, ...] = (
    "mask that meets it",
    "mask elsewhere",
    "empty mask",
    "no mask",
  )
  counts = {
    row: {column: 0 for column in columns} for row in ("target", "no target")
  }
  for record in masks:
    truth = records.pixels(record["truth"])
    answer = records.pixels(record["mask"])
    if not record["has_mask"]:
      column = "no mask"
    elif not answer.any():
      column = "empty mask"
    else:
      column = columns[0 if (answer & truth).any() else 1]
    counts["target" if truth.any() else "no target"][column] += 1
  return counts


def distributions(masks: Sequence[dict[str, Any]]) -> np.ndarray:
  """uint8 [h w 3]: IoU as a histogram, by size of the object, by length of the
  request."""
  ious = np.array([r["iou"] for r in masks])
  shares = np.array([records.pixels(r["truth"]).mean() for r in masks])
  lengths = np.array([_num_words(r) for r in masks])
  figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), dpi=100)
  axes[0].hist(ious, np.linspace(0, 1, 21), color=_COLOR, edgecolor="white")
  axes[0].axvline(ious.mean(), color="#ee7733", label=f"mean {ious.mean():.3f}")
  axes[0].legend(frameon=False)
  axes[0].set(xlabel="IoU", ylabel="samples", title="How good the masks are")
  percent = [f"≤ {100 * end:g} %" for end in _SIZES]
  with_target = shares > 0
  _bars(axes[1], ious[with_target], shares[with_target], _SIZES, percent)
  axes[1].set(
    xlabel="object, share of its image", title="By size of the object"
  )
  starts = (1, *(end + 1 for end in _WORDS[:-1]))
  names = [
    str(b) if a == b else f"{a}-{b}"
    for a, b in zip(starts, _WORDS, strict=True)
  ]
  names[-1] = f"{starts[-1]}+"
  _bars(axes[2], ious, lengths, _WORDS, names)
  axes[2].set(xlabel="words of the request", title="By length of the request")
  for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
  figure.tight_layout()
  figure.canvas.draw()
  canvas = cast(FigureCanvasAgg, figure.canvas)  # Of the backend above.
  drawn = np.array(canvas.buffer_rgba())[..., :3]
  plt.close(figure)
  return drawn


def _bars(ax, ious, values, ends, names) -> None:
  """Mean IoU of each group, its number of samples above."""
  group = np.searchsorted(ends[:-1], values)
  for place in range(len(ends)):
    part = ious[group == place]
    if part.size:
      ax.bar(place, part.mean(), color=_COLOR)
      ax.text(place, part.mean() + 0.02, str(part.size), ha="center")
  ax.set_xticks(range(len(names)), names, fontsize=8)
  ax.set(
    xlim=(-0.6, len(names) - 0.4),
    ylim=(0, 1.12),
    ylabel="mean IoU (samples above)",
  )


def _num_words(record: dict[str, Any]) -> int:
  """Of all wordings together; of the whole request where there are none."""
  said = record["expressions"] or [record["question"].replace("<image>", "")]
  return max(len(" ".join(said).split()), 1)


def _turned(
  metrics: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Metrics downwards, data sets across."""
  names = dict.fromkeys(name for values in metrics.values() for name in values)
  return {
    name: {
      split: values[name] for split, values in metrics.items() if name in values
    }
    for name in names
  }


def _questions(words: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Some questions with their answers."""
  order = np.random.default_rng(0).permutation(len(words))[: 3 * _EACH]
  return {
    f"sample {r['sample']}": {
      "question": r["question"].replace("<image>", "").strip(),
      "true": r["answers"][0],
      "answer": r["text"],
      "score": r["score"],
    }
    for r in (words[i] for i in sorted(order))
  }


def _with_strips(
  chosen: Sequence[dict[str, Any]],
  split: SplitResults,
  evaluator: Evaluator,
  state: nnx.State,
) -> list[render.Shown]:
  """Records with their images and the mask image after each scale."""
  rows = split.rows
  strips = _strips([r["sample"] for r in chosen], rows, evaluator, state)
  model: ARGenSeg = nnx.merge(evaluator.graph, state)
  shown = []
  for record, strip in zip(chosen, strips, strict=True):
    own = strip[record["number"]] if record["has_mask"] else strip[0, :0]
    shown.append(_shown(record, rows, own, model.scales.sides))
  return shown


def _shown(
  record: dict[str, Any],
  rows: pipeline.RowMaker,
  strip: np.ndarray,
  sides: tuple[int, ...],
) -> render.Shown:
  sample = rows.source[record["sample"]]
  asked = record["question"] or ", ".join(record["expressions"])
  return render.Shown(
    image=sample.load_image(),
    request=asked.replace("<image>", "").strip(),
    truth=records.pixels(record["truth"]),
    prediction=records.pixels(record["mask"]),
    strip=strip,
    sides=sides,
    iou=record["iou"],
    answer=record["text"] or "(no words)",
  )


def _strips(
  indices: Sequence[int], rows, evaluator: Evaluator, state: nnx.State
) -> list[np.ndarray]:
  """uint8 [masks scales side side 3] of each sample, answered once more."""
  graph = evaluator.graph

  @sharding.jit
  def decode(state, codes):
    vqvae = nnx.merge(graph, state).vqvae
    drawn = vqvae.decode_prefixes(codes.reshape(-1, codes.shape[-1]))
    return to_uint8(drawn).reshape(*codes.shape[:2], *drawn.shape[1:])

  size = evaluator.batch_size(state)
  share = size // jax.process_count()
  first = share * jax.process_index()
  found = []
  for start in range(0, len(indices), size):
    part = [*indices[start : start + size]]
    padded = part + [len(rows.source)] * (size - len(part))
    own = [rows(i) for i in padded[first : first + share]]
    answers = evaluator.answer(state, rows, stack_rows(own)[0])
    strips = distributed.fetch(decode(state, answers.codes))
    found += list(strips[: len(part)])
  return found
