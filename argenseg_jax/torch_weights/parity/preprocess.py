"""Parity of what happens to images and text before and after the model."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from argenseg_jax.data import chat, text, transforms
from argenseg_jax.evaluation import segmentation_metrics
from argenseg_jax.inference.segment import seg_mask_at_size
from argenseg_jax.models.argenseg import normalize_images, normalize_seg_masks
from argenseg_jax.torch_weights.parity.compare import Check, Golden


def checks(golden: Golden) -> dict[str, Check]:
  """One check for every array that this kind of folder may hold."""
  config = golden.config
  tokenizer = text.TextTokenizer.from_characters(config["toy_vocab"])
  found = _sample_checks(golden)
  for i in range(len(config.get("sizes", ()))):
    found |= _image_checks(golden, i)
  for i, case in enumerate(config.get("conversations", ())):
    found |= _chat_checks(golden, tokenizer, i, case)
  found |= _prompt_checks(config, tokenizer)
  return found


def _image_checks(golden: Golden, i: int) -> dict[str, Check]:
  config = golden.config

  def image(pad_square):
    pixels = transforms.resize_image(
      golden[f"in.image{i}"], config["input_size"], pad_square=pad_square
    )
    return jnp.moveaxis(normalize_images(jnp.asarray(pixels)), -1, 0)

  def target(pad_square, name):
    shape = golden[name].shape
    levels = golden[f"in.mask{i}"]
    if levels.max() < 127:  # As the authors do: of 2, that makes 254.
      levels = levels * np.uint8(255)
    pixels = transforms.mask_target(levels, shape[-1], pad_square=pad_square)
    normalized = normalize_seg_masks(jnp.asarray(pixels)[..., None])
    return jnp.moveaxis(normalized, -1, 0)[: shape[0]]

  def tiles():
    return transforms.image_tiles(
      golden[f"in.image{i}"],
      config["input_size"],
      max_tiles=config["max_tiles"],
    )

  def gray(pad_square):
    size = golden[f"in.image{i}"].shape[:2]
    return transforms.gray_at_size(
      golden[f"in.gen{i}"], size, pad_square=pad_square
    )

  found = {
    f"out.tiles_uint8_{i}": Check(tiles),
    f"out.pred_mask{i}": Check(
      lambda: seg_mask_at_size(
        golden[f"in.gen{i}"], golden[f"in.image{i}"].shape[:2]
      ),
      exact=True,
    ),
  }
  for pad, flag in (("", False), ("_pad", True)):
    name = f"out.mask_tensor{pad}{i}"
    found[name] = Check(functools.partial(target, flag, name))
    found[f"out.pixel_values{pad}{i}"] = Check(functools.partial(image, flag))
    found[f"out.pred_L{pad}{i}"] = Check(functools.partial(gray, flag))
  return found


def _sample_checks(golden: Golden) -> dict[str, Check]:
  """Intersections and unions of the generated masks with the true ones."""

  @functools.cache
  def samples():
    pairs = [
      (golden[f"in.gen{i}"], golden[f"in.mask{i}"])
      for i in range(len(golden.config.get("sizes", ())))
    ]
    if "in.gt_empty" in golden:
      pairs.append((golden["in.gen_empty"], golden["in.gt_empty"]))
    return [
      (seg_mask_at_size(made, truth.shape), truth > 0) for made, truth in pairs
    ]

  @functools.cache
  def overlaps():
    """[sample, background | foreground, intersection | union]."""
    return np.array(
      [
        [
          segmentation_metrics.overlap(~made, ~truth),
          segmentation_metrics.overlap(made, truth),
        ]
        for made, truth in samples()
      ],
      np.float64,
    )

  def iou():
    intersection, union = overlaps()[..., 0], overlaps()[..., 1]
    return np.where(union > 0, intersection / (union + 1e-10), 1.0)

  @functools.cache
  def results():
    sums = segmentation_metrics.SegmentationSums()
    for made, truth in samples():
      sums += segmentation_metrics.score(made, truth)
    return sums.results()

  return {
    "out.intersection": Check(lambda: overlaps()[..., 0]),
    "out.union": Check(lambda: overlaps()[..., 1]),
    "out.iou_per_sample": Check(iou),
    "out.ciou": Check(lambda: np.array([results()["ciou"]])),
    "out.giou": Check(lambda: np.array([results()["giou"]])),
  }


def _chat_checks(
  golden: Golden, tokenizer: text.TextTokenizer, i: int, case: Mapping[str, Any]
) -> dict[str, Check]:
  pad = tokenizer.token_ids.pad

  @functools.cache
  def tokenized(padded):
    tokens = chat.tokenize_chat(
      tokenizer,
      case["turns"],
      image_tokens=() if case["text_only"] else (case["num_image_token"],),
      num_codes=case["num_mask_token"],
      system_message=golden.config["system_message"],
    )
    return tokens.padded(golden.config["max_len"], pad) if padded else tokens

  found = {}
  for suffix, padded in (("", False), ("_padded", True)):
    tokens = functools.partial(tokenized, padded)
    found |= {
      f"out.conv{i}.input_ids{suffix}": Check(lambda t=tokens: t().ids),
      f"out.conv{i}.labels{suffix}": Check(lambda t=tokens: t().labels),
      f"out.conv{i}.attention_mask{suffix}": Check(
        lambda t=tokens: t().ids != pad
      ),
      f"out.conv{i}.position_ids{suffix}": Check(
        lambda t=tokens: t().position_ids(pad)
      ),
    }
  return found


def _prompt_checks(
  config: Mapping[str, Any], tokenizer: text.TextTokenizer
) -> dict[str, Check]:
  def prompt():
    return chat.chat_prompt(
      tokenizer,
      [{"from": "human", "value": config["chat_question"]}],
      image_tokens=(config["chat_num_image_token"],),
      system_message=config["system_message"],
    )

  return {
    "out.chat.prompt_utf8": Check(
      lambda: np.frombuffer(prompt().encode(), np.uint8), exact=True
    ),
    "out.chat.input_ids": Check(
      lambda: chat.encode_prompt(tokenizer, prompt())
    ),
  }
