"""The page itself, in gradio."""

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from starlette.middleware import Middleware

from argenseg_jax.data.errors import DataError
from argenseg_jax.tools.demo import answers
from argenseg_jax.tools.demo.answers import Answerer, Asked, Found
from argenseg_jax.tools.demo.limits import RateLimit
from argenseg_jax.visualize import render

_WORDS, _POINT, _BOX = "type a request", "click a point", "click two corners"
# Of calls that only the page makes.
_HIDDEN: dict[str, Any] = {"api_visibility": "private"}
_QUEUE = 64  # Calls that may wait; more are told to come back.


def _upload() -> gr.Image:
  """An image that arrives as the file that was sent: our own decoder reads it,
  with its own limits and its own sentences."""
  image = gr.Image(
    type="filepath",
    image_mode=None,
    sources=["upload", "clipboard", "webcam"],
    label="Image",
    height=360,
  )
  decoded = image.preprocess

  def preprocess(payload: ImageData | None) -> Any:
    if payload is None or (payload.url or "").startswith("data:"):
      return decoded(payload)
    return payload.path

  image.preprocess = preprocess
  return image


def build(answerer: Answerer, examples: Sequence[str]) -> gr.Blocks:
  """The page; `serve` opens it.

  Args:
    answerer: warm.
    examples: paths of images to pick from.
  """
  with gr.Blocks(title="argenseg", analytics_enabled=False) as demo:
    gr.Markdown(
      "# argenseg\nSegments by generating the mask's codes, coarse to fine."
    )
    with gr.Tab("Segment"):
      _segment_tab(answerer, examples)
    with gr.Tab("Converse"):
      _chat_tab(answerer)
  return demo


def serve(
  demo: gr.Blocks,
  *,
  host: str,
  port: int,
  share: bool,
  per_minute: int,
  max_megabytes: int,
  block: bool = True,
) -> str:
  """Opens the page; returns its address once it is closed, or at once.

  Args:
    demo: from `build`.
    host, port: where it listens; port 0 takes any free one.
    share: also through gradio's servers.
    per_minute: most calls a minute of one address.
    max_megabytes: of an upload.
    block: wait until it is interrupted.
  """
  demo.queue(max_size=_QUEUE, default_concurrency_limit=1)
  limit = Middleware(RateLimit, per_minute=per_minute)
  _, address, _ = demo.launch(
    server_name=host,
    server_port=port or None,
    share=share,
    quiet=True,
    max_file_size=max_megabytes * 2**20,
    app_kwargs={"middleware": [limit]},
    prevent_thread_lock=True,
    footer_links=["api"],
    ssr_mode=False,
    run_history=False,
  )
  print(f"open {address}", flush=True)
  if block:
    demo.block_thread()
  return address


def _segment_tab(answerer: Answerer, examples: Sequence[str]) -> None:
  found, corners = gr.State(None), gr.State([])
  with gr.Row():
    with gr.Column():
      image = _upload()
      image.elem_id = "image"
      mode = gr.Radio([_WORDS, _POINT, _BOX], value=_WORDS, label="Ask by")
      requests = gr.Textbox(
        label="Requests, one a line",
        lines=2,
        max_length=answers.MAX_REQUESTS * answers.MAX_CHARACTERS,
        elem_id="requests",
      )
      button = gr.Button("Segment", variant="primary", elem_id="segment")
      if examples:
        gr.Examples([[path] for path in examples], [image])
    with gr.Column():
      shown = gr.Gallery(label="Masks", columns=2, elem_id="masks")
      opacity = gr.Slider(0.0, 1.0, 0.65, step=0.05, label="Opacity")
      said = gr.Markdown(elem_id="answer")
      scales = gr.Gallery(
        label="Coarse to fine", columns=4, height=220, elem_id="scales"
      )
      downloads = gr.File(label="Masks as PNG and COCO run lengths")
  outputs = [shown, said, scales, downloads, found]

  def segment(images, texts, opacities):
    """Segments an image; every line of the request is answered.

    Returns overlays with captions, Markdown, animations, and files.
    """
    asked = [Asked(*pair) for pair in zip(images, texts, strict=True)]
    return _columns(answerer(asked), opacities)

  def at_place(images, places, opacities):
    asked = [
      Asked(image, *place) for image, place in zip(images, places, strict=True)
    ]
    return _columns(answerer(asked), opacities)

  # All calls of the model share one worker: no two compile at once.
  shared = {
    "batch": True,
    "max_batch_size": answerer.batch_size,
    "concurrency_id": "model",
  }
  button.click(
    segment, [image, requests, opacity], outputs, api_name="segment", **shared
  )
  place = gr.State(None)
  clicked = image.select(
    _clicked, [image, mode, corners], [corners, place, said], **_HIDDEN
  )
  clicked.success(_require_place, [place], None, **_HIDDEN).success(
    at_place, [image, place, opacity], outputs, **_HIDDEN, **shared
  )
  opacity.release(
    lambda kept, share: answers.overlays(kept, share) if kept else [],
    [found, opacity],
    [shown],
    **_HIDDEN,
  )


def _columns(found: Sequence[Found], opacities: Sequence[float]) -> list[list]:
  """gradio's batches: one list for each output."""
  rows = []
  for answer, opacity in zip(found, opacities, strict=True):
    masks, strips = answers.files(answer)
    overlays = answers.overlays(answer, opacity)
    rows.append((overlays, answers.report(answer), strips, masks, answer))
  return [list(column) for column in zip(*rows, strict=True)]


def _clicked(image, mode, corners, event: gr.SelectData):
  """Corners so far, the place once it is whole, and what to do next."""
  if mode == _WORDS:
    return [], None, gr.skip()
  corners = [*corners, tuple(event.index)]
  if mode == _BOX and len(corners) < 2:
    return corners, None, "now click the opposite corner"
  try:
    return [], answers.place_request(image, corners[-2:]), gr.skip()
  except DataError as error:
    return [], None, answers.refusal(str(error))


def _require_place(place) -> None:
  if place is None:
    # What follows is left out; nothing is wrong.
    raise gr.Error(visible=False, print_exception=False)


def _chat_tab(answerer: Answerer) -> None:
  history = gr.State([])
  with gr.Row():
    image = _upload()
    with gr.Column():
      talk = gr.Chatbot(
        buttons=["copy"], label="Conversation", elem_id="conversation"
      )
      message = gr.Textbox(
        label="Message", max_length=answers.MAX_CHARACTERS, elem_id="message"
      )
      again = gr.Button("Start over")

  def converse(path, said, turns, bubbles):
    turns = [*turns, {"from": "human", "value": said}]
    bubbles = [*bubbles, {"role": "user", "content": html.escape(said)}]
    try:
      pixels, answer = answerer.converse(path, turns)
    except DataError as error:
      fault = {"role": "assistant", "content": answers.refusal(str(error))}
      return "", turns[:-1], [*bubbles, fault]
    turns = [*turns, {"from": "gpt", "value": answer.text}]
    words = f"{html.escape(answer.text)} ({answers.describe(answer)})"
    bubbles = [*bubbles, {"role": "assistant", "content": words}]
    if answer.has_mask and pixels is not None:
      drawn = render.overlay(pixels, answer.seg_mask)
      bubbles.append({"role": "assistant", "content": gr.Image(drawn)})
    return "", turns, bubbles

  message.submit(
    converse,
    [image, message, history, talk],
    [message, history, talk],
    **_HIDDEN,
    concurrency_id="model",
  )
  cleared = ([], [])
  again.click(lambda: cleared, None, [history, talk], **_HIDDEN)
  image.change(lambda: cleared, None, [history, talk], **_HIDDEN)
