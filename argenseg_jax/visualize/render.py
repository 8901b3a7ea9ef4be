"""What a model does, drawn: overlays, strips, `report.png`, `report.html` and
`validation.png`."""

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("agg")

import matplotlib.pyplot as plt


class Shown(NamedTuple):
  """One row of a report."""

  image: np.ndarray  # uint8 [h w 3]
  request: str
  truth: np.ndarray  # bool [h w]
  prediction: np.ndarray  # bool [h w]
  strip: np.ndarray  # uint8 [scales side side 3]
  sides: tuple[int, ...]  # Of the token map of each scale.
  iou: float
  answer: str


# Tints of overlays, RGB; the one farthest from the object is taken.
_TINTS = np.array(
  [(255, 20, 80), (0, 200, 255), (60, 230, 60), (255, 160, 0), (170, 60, 255)]
)


def standout_color(image: np.ndarray, seg_mask: np.ndarray) -> np.ndarray:
  """The tint (uint8 RGB [3]) that differs most from what is under a mask.

  Args:
    image: uint8 RGB [h w 3].
    seg_mask: bool [h w]; where it is empty, the first tint is returned.
  """
  if not seg_mask.any():
    return _TINTS[0].astype(np.uint8)
  mean = image[seg_mask].mean(0)
  # The eye sees differences in green best, in blue least.
  distances = ((_TINTS - mean) ** 2 * (2, 4, 3)).sum(1)
  return _TINTS[distances.argmax()].astype(np.uint8)


def overlay(
  image: np.ndarray, seg_mask: np.ndarray, *, opacity: float = 0.65
) -> np.ndarray:
  """The image with the mask tinted in a color unlike the object, and outlined.

  Args:
    image: uint8 RGB [h w 3].
    seg_mask: bool [h w].
    opacity: of the tint, 0 to 1.
  """
  tint = standout_color(image, seg_mask).astype(np.float32)
  tinted = image.astype(np.float32)
  tinted[seg_mask] = (1 - opacity) * tinted[seg_mask] + opacity * tint
  padded = np.pad(seg_mask, 1)
  inside = padded[1:-1, 1:-1]
  for shift in ((0, 1), (2, 1), (1, 0), (1, 2)):
    h, w = seg_mask.shape
    inside = inside & padded[shift[0] : shift[0] + h, shift[1] : shift[1] + w]
  tinted[seg_mask & ~inside] = (255, 255, 255)
  return tinted.astype(np.uint8)


def write_animation(
  strip: np.ndarray, path: pathlib.Path, *, side: int = 256
) -> None:
  """Writes a looping WebP of the mask image after each scale.

  Args:
    strip: uint8 [scales side side 3], coarse to fine.
    path: of the file, `.webp`.
    side: of a frame, in pixels.
  """
  frames = [
    Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
    for tile in strip
  ]
  frames[0].save(
    path,
    save_all=True,
    append_images=frames[1:],
    duration=[400] * (len(frames) - 1) + [1200],
    loop=0,
    lossless=True,
  )


def join_strip(strip: np.ndarray, height: int) -> np.ndarray:
  """Mask images after each scale, side by side, `height` pixels high; a gray
  tile where there are none."""
  if not len(strip):
    return np.full((height, height, 3), 235, np.uint8)
  tiles = [
    np.asarray(
      Image.fromarray(tile).resize((height, height), Image.Resampling.BILINEAR)
    )
    for tile in strip
  ]
  gap = np.full((height, max(height // 32, 1), 3), 128, np.uint8)
  parts = [part for tile in tiles for part in (tile, gap)][:-1]
  return np.concatenate(parts, axis=1)


def draw_rows(rows: Sequence[Shown], path: pathlib.Path) -> None:
  """Writes one PNG: request and image, truth, answer, and where there are
  strips, the mask image after each scale."""
  scales = max(len(row.strip) for row in rows)
  width = min(1.9 * (3 + scales), 18)
  figure, axes = plt.subplots(
    len(rows),
    3 + (scales > 0),
    figsize=(width, (width / (3 + scales) + 0.45) * len(rows)),
    width_ratios=(1, 1, 1, scales)[: 3 + (scales > 0)],
    squeeze=False,
  )
  for ax in axes.flat:
    ax.set(xticks=(), yticks=())
    ax.spines[:].set_visible(False)
  for row, (left, true, answer, *rest) in zip(
    map(_at_display_size, rows), axes, strict=True
  ):
    left.imshow(row.image)
    left.set_title(_shorten(row.request), fontsize=8)
    true.imshow(overlay(row.image, row.truth))
    true.set_title("truth", fontsize=8)
    answer.imshow(overlay(row.image, row.prediction))
    answer.set_title(f"answer, IoU {row.iou:.2f}", fontsize=8)
    for strip in rest:
      _draw_strip(strip, row)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _draw_strip(ax, row: Shown) -> None:
  """Each scale's name under its tile."""
  side = 96
  drawn = join_strip(row.strip, side)
  ax.imshow(drawn)
  if not len(row.strip):
    ax.set_title("no mask", fontsize=8)
    return
  ax.set_title("the answer, scale by scale", fontsize=8)
  pitch = (drawn.shape[1] - side) / max(len(row.strip) - 1, 1)
  places = [side / 2 + pitch * i for i in range(len(row.strip))]
  ax.set_xticks(places, _scale_names(row), fontsize=7)
  ax.tick_params(length=0)


def _scale_names(row: Shown) -> list[str]:
  return [f"{side} x {side}" for side in row.sides[: len(row.strip)]]


def _at_display_size(row: Shown, height: int = 256) -> Shown:
  """Outlines of masks are as thick in a small image as in a large one."""
  h, w, _ = row.image.shape
  size = max(round(height * w / h), 1), height
  # Enlarged pixels compress well.
  how = Image.Resampling.NEAREST if h <= height else Image.Resampling.LANCZOS
  image = Image.fromarray(row.image).resize(size, how)
  truth, prediction = (
    np.asarray(Image.fromarray(m).resize(size, Image.Resampling.NEAREST))
    for m in (row.truth, row.prediction)
  )
  return row._replace(
    image=np.asarray(image), truth=truth, prediction=prediction
  )


def write_html(path: pathlib.Path, *, title: str, parts: Sequence[str]) -> None:
  """Writes a self-contained page.

  Args:
    path: of the page.
    title: its heading.
    parts: HTML from the functions below.
  """
  title = html.escape(title)
  body = "\n".join((f"<h1>{title}</h1>", *parts))
  path.write_text(_PAGE.format(title=title, body=body))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd;
  text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img.wide {{ width: 100%; }}
figure {{ margin: 1.2rem 0; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 6px; margin-top: .3rem; }}
.tiles div {{ text-align: center; font-size: 12px; color: #666; }}
.tiles img {{ display: block; height: 144px; }}
.tiles img.scale {{ height: 96px; margin-top: 48px; }}
</style><body>{body}</body></html>
"""


def heading(words: str, level: int = 2) -> str:
  """A heading."""
  return f"<h{level}>{html.escape(words)}</h{level}>"


def paragraph(words: str) -> str:
  """A paragraph."""
  return f"<p>{html.escape(words)}</p>"


def wide_image(pixels: np.ndarray) -> str:
  """An image as wide as the page, from uint8 [h w 3]."""
  return f'<img class="wide" alt="" src="{_data_uri(pixels)}">'


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """Row name -> column name -> value as a table."""
  columns = list(dict.fromkeys(c for row in rows.values() for c in row))
  head = "".join(f"<th>{html.escape(c)}</th>" for c in ["", *columns])
  body = []
  for name, row in rows.items():
    cells = [f"<td>{html.escape(name)}</td>"]
    for column in columns:
      value = row.get(column, "")
      text = str(value)
      if isinstance(value, float):
        text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
      cells.append(f"<td>{html.escape(text)}</td>")
    body.append(f"<tr>{''.join(cells)}</tr>")
  return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def example(row: Shown) -> str:
  """A request with its image, truth, answer, and answer scale by scale."""
  row = _at_display_size(row)
  tiles = [
    _tile(row.image, "image"),
    _tile(overlay(row.image, row.truth), "truth"),
    _tile(overlay(row.image, row.prediction), "answer"),
  ]
  for pixels, name in zip(row.strip, _scale_names(row), strict=True):
    tiles.append(_tile(pixels, name, "scale"))
  caption = (
    f"<b>{html.escape(row.request)}</b>, IoU {row.iou:.2f}; "
    f"answer: {html.escape(row.answer)}"
  )
  return (
    f"<figure><figcaption>{caption}</figcaption>"
    f'<div class="tiles">{"".join(tiles)}</div></figure>'
  )


def _tile(pixels: np.ndarray, name: str, kind: str = "image") -> str:
  image = f'<img class="{kind}" alt="{name}" src="{_data_uri(pixels)}">'
  return f"<div>{image}{name}</div>"


def _data_uri(image: np.ndarray) -> str:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  code = base64.b64encode(buffer.getvalue()).decode()
  return f"data:image/png;base64,{code}"


def _shorten(text: str, limit: int = 44) -> str:
  text = text if len(text) <= limit else text[: limit - 1] + "…"
  return text.replace("$", r"\$")  # It is no formula.
