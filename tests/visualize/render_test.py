"""Reports: overlays keep the image, pages hold everything they show."""

import numpy as np
from PIL import Image

from argenseg_jax.visualize import render


def shown(request="the <red> circle"):
  image = np.full((20, 30, 3), 100, np.uint8)
  truth = np.zeros((20, 30), bool)
  truth[5:15, 5:15] = True
  strip = np.zeros((3, 8, 8, 3), np.uint8)
  return render.Shown(
    image, request, truth, truth, strip, (1, 4, 8), 1.0, "<ge_end>"
  )


def test_overlay_changes_only_the_mask():
  row = shown()
  drawn = render.overlay(row.image, row.truth)
  np.testing.assert_array_equal(drawn[~row.truth], row.image[~row.truth])
  np.testing.assert_array_equal(drawn[5, 5], (255, 255, 255))  # The outline.
  inside = drawn[10, 10].astype(int)
  tint = render.standout_color(row.image, row.truth)
  assert np.abs(inside - tint).sum() < np.abs(100 - inside).sum()


def test_strip_joins_all_scales():
  assert render.join_strip(shown().strip, 32).shape == (32, 3 * 32 + 2, 3)


def test_html_is_self_contained_and_escapes(tmp_path):
  path = tmp_path / "report.html"
  render.write_html(
    path,
    title="a & b",
    parts=[
      render.heading("Scores"),
      render.table({"val": {"ciou": 0.5}}),
      render.example(shown()),
    ],
  )
  text = path.read_text()
  assert "the &lt;red&gt; circle" in text
  assert "0.500" in text
  assert text.count("data:image/png;base64,") == 6
  assert ">4 x 4</div>" in text  # Under its tile.
  assert "http" not in text


def test_png_is_written(tmp_path):
  path = tmp_path / "report.png"
  render.draw_rows([shown("$5_{ and $x^"), shown("x" * 99)], path)
  with Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB"))
  # The image's gray, and the tint of both masks, in the upper row and below.
  tint = render.overlay(shown().image, shown().truth)[10, 10]
  for half in np.split(pixels[: len(pixels) // 2 * 2], 2):
    for color in ((100, 100, 100), tint):
      assert np.any(np.all(half == np.asarray(color), -1)), color
