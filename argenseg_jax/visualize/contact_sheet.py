"""A drawing of rows as the model gets them: asked, marked, tokenized."""

import pathlib
import re
import textwrap
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib import colors, patches

from argenseg_jax.data import pipeline, text
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET, Batch
from argenseg_jax.visualize import render

matplotlib.use("agg")

import matplotlib.pyplot as plt

# What a position of a row is, and its color.
LAYOUT = {
  "padding": "#dddddd",
  "text that is given": "#4477aa",
  "image": "#228833",
  "text to learn": "#ee7733",
  "code to learn": "#aa3377",
}

_TURN = re.compile(
  r"<\|im_start\|>(user|assistant)\s(.*?)(?:<\|im_end\|>|$)", re.S
)

# Ways to store a mask that need no second look.
_PLAIN = ("two values", "run lengths", "polygons", "label map")

Reconstruct = Callable[[np.ndarray], np.ndarray]


def token_layout(row: Batch, img_context: int) -> np.ndarray:
  """int [t]: which key of `LAYOUT` each position of a row is.

  A position that predicts an image code counts as code, whatever it holds.

  Args:
    row: without the batch axis.
    img_context: token id of `<IMG_CONTEXT>`.
  """
  layout = np.where(row.segment_ids > 0, 1, 0)
  layout[row.tokens == img_context] = 2
  # A target stands one position before the token that it is.
  text = (row.targets != IGNORE_TARGET) & (row.targets != CODE_TARGET)
  layout[1:][text[:-1]] = 3
  layout[row.targets == CODE_TARGET] = 4
  return layout


def turns(row: Batch, tokenizer: text.TextTokenizer) -> list[str]:
  """What is said in a row, in turns, an arrow before each answer.

  Roles, images and the system message are left out; a mask is `<mask>`.

  Args:
    row: without the batch axis.
    tokenizer: that the row was made with.
  """
  said = tokenizer.decode(row.tokens[row.segment_ids > 0], keep_special=True)
  said = re.sub("<img>.*?</img>", "", said, flags=re.S)
  said = re.sub("<ge_start>.*?<ge_end>", "<mask>", said, flags=re.S)
  return [
    ("\N{RIGHTWARDS ARROW} " if role == "assistant" else "") + words.strip()
    for role, words in _TURN.findall(said)
  ]


def odd_masks(rows: pipeline.RowMaker, index: int) -> list[str]:
  """How masks of a record are stored and what values they hold, where that is
  not two plain gray levels, run lengths, polygons or a map of labels."""
  sample = rows.source[index]
  if sample.target != "mask":
    return []
  chosen = sample.choose(0) if sample.options else sample
  readings = [chosen.read_mask(stored) for stored in chosen.seg_masks]
  return [
    f"{reading.kind}: {reading.found}"
    for reading in readings
    if reading.kind not in _PLAIN
  ]


def draw(
  rows: pipeline.RowMaker,
  indices: Sequence[int],
  path: pathlib.Path,
  *,
  reconstruct: Reconstruct | None = None,
) -> None:
  """Writes one PNG with a line for each record; a bad one shows its fault.

  Args:
    rows: makes the rows.
    indices: of the records.
    path: of the PNG.
    reconstruct: uint8 masks [m h w 1|3] -> uint8 [m h w 3], what the image
      tokenizer makes of them; None leaves that column out.
  """
  titles = ["image", "mask", "layout of the tokens"]
  if reconstruct is not None:
    titles.insert(2, "mask, encoded and decoded")
  height = 2.2 * len(indices) + 0.6
  figure, axes = plt.subplots(
    len(indices),
    len(titles),
    figsize=(3 * len(titles) + 2, height),
    width_ratios=(1,) * (len(titles) - 1) + (2,),
    squeeze=False,
  )
  for line, index in zip(axes, indices, strict=True):
    row = rows(index)
    for ax in line:
      ax.axis("off")
    if row.error:
      line[0].set_title(_wrap(row.error), fontsize=7, loc="left", color="red")
      continue
    _draw_row(line, rows, row.fields, reconstruct)
    if stored := odd_masks(rows, index):
      line[1].text(
        *(0, -0.04, _wrap("; ".join(stored), 40)),
        transform=line[1].transAxes,
        fontsize=6,
        va="top",
      )
  for ax, title in zip(axes[0][1:], titles[1:], strict=True):
    ax.set_title(title, fontsize=8)
  figure.legend(
    handles=[patches.Patch(color=c, label=n) for n, c in LAYOUT.items()],
    loc="lower center",
    ncols=len(LAYOUT),
    fontsize=8,
  )
  figure.tight_layout(rect=(0, 0.4 / height, 1, 1))
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _draw_row(line, rows, fields: Batch, reconstruct) -> None:
  special = rows.tokenizer.token_ids
  said = turns(fields, rows.tokenizer)[:6]
  each = max(6 // max(len(said), 1), 1)
  caption = "\n".join(_wrap(words, lines=each) for words in said)
  line[0].set_title(caption, fontsize=7, loc="left")
  if placed := np.count_nonzero(fields.tokens == special.img_start):
    line[0].imshow(_side_by_side(fields.images[:placed]))
  seg_masks = fields.seg_masks[fields.mask_valid]
  if len(seg_masks):
    line[1].imshow(_side_by_side(seg_masks), cmap="gray")
    if reconstruct is not None:
      line[2].imshow(_side_by_side(reconstruct(seg_masks)))
  layout = token_layout(fields, special.img_context)
  used = max(np.count_nonzero(fields.segment_ids), 1)
  ax = line[-1]
  ax.imshow(
    layout[None, :used],
    cmap=colors.ListedColormap(list(LAYOUT.values())),
    vmin=-0.5,
    vmax=len(LAYOUT) - 0.5,
    aspect="auto",
    interpolation="nearest",
    extent=(0, used, 0, 1),
  )
  for end in np.flatnonzero(np.diff(fields.segment_ids[:used])) + 1:
    ax.axvline(end, color="black")
  counts = ", ".join(
    f"{np.count_nonzero(layout == i)} {name}"
    for i, name in enumerate(LAYOUT)
    if (layout == i).any()
  )
  ax.text(0, -0.02, _wrap(counts, 60), fontsize=7, va="top")
  ax.set_ylim(-0.6, 1)


def _side_by_side(images: np.ndarray) -> np.ndarray:
  height = images.shape[1]
  if images.shape[-1] == 1:
    images = np.repeat(images, 3, -1)
  return render.join_strip(images, height)


def _wrap(said: str, width: int = 48, lines: int = 3) -> str:
  wrapped = textwrap.wrap(said, width, max_lines=lines, placeholder=" ...")
  return "\n".join(wrapped).replace("$", r"\$")
