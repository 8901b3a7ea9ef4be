"""What every forward pass is fed, and what is made of every mask image, equal
what the authors' code computed; bytes and tokens to the bit.

The arrays were recorded by running it; tests/golden/preprocess holds them.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.data import chat, text, transforms
from argenseg_jax.inference.segment import seg_mask_at_size
from argenseg_jax.models.argenseg import normalize_images, normalize_seg_masks

_FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "preprocess"
CONFIG = json.loads((_FOLDER / "config.json").read_text())
IMAGES = range(len(CONFIG["sizes"]))
CONVERSATIONS = range(len(CONFIG["conversations"]))
FIRST_CODE = max(CONFIG["toy_vocab"].values()) + 1


@pytest.fixture(scope="module")
def arrays():
  with np.load(_FOLDER / "io.npz") as stored:
    return dict(stored)


@pytest.fixture(scope="module")
def toy():
  return text.TextTokenizer.from_characters(CONFIG["toy_vocab"])


def _assert_normalized(normalize, pixels, recorded):
  """But for rounding: a program multiplies where PyTorch divides."""
  got = np.moveaxis(np.asarray(normalize(jnp.asarray(pixels))), -1, 0)
  np.testing.assert_allclose(got[: len(recorded)], recorded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pad_square", [False, True])
@pytest.mark.parametrize("i", IMAGES)
def test_images(arrays, i, pad_square):
  pixels = transforms.resize_image(
    arrays[f"in.image{i}"], CONFIG["input_size"], pad_square=pad_square
  )
  name = "pixel_values_pad" if pad_square else "pixel_values"
  _assert_normalized(normalize_images, pixels, arrays[f"out.{name}{i}"])


@pytest.mark.parametrize("i", IMAGES)
def test_tiles(arrays, i):
  got = transforms.image_tiles(
    arrays[f"in.image{i}"], CONFIG["input_size"], max_tiles=CONFIG["max_tiles"]
  )
  np.testing.assert_array_equal(got, arrays[f"out.tiles_uint8_{i}"])


@pytest.mark.parametrize("pad_square", [False, True])
@pytest.mark.parametrize("i", IMAGES)
def test_mask_targets(arrays, i, pad_square):
  name = f"out.mask_tensor{'_pad' if pad_square else ''}{i}"
  levels = arrays[f"in.mask{i}"]
  if levels.max() < 127:  # As the authors do: of 2, that makes 254.
    levels = levels * np.uint8(255)
  pixels = transforms.mask_target(
    levels, arrays[name].shape[-1], pad_square=pad_square
  )
  _assert_normalized(normalize_seg_masks, pixels[..., None], arrays[name])


@pytest.mark.parametrize("pad_square", [False, True])
@pytest.mark.parametrize("i", IMAGES)
def test_answers_at_the_size_of_their_images(arrays, i, pad_square):
  gray = transforms.gray_at_size(
    arrays[f"in.gen{i}"], tuple(CONFIG["sizes"][i]), pad_square=pad_square
  )
  name = "pred_L_pad" if pad_square else "pred_L"
  np.testing.assert_array_equal(gray, arrays[f"out.{name}{i}"])
  if not pad_square:
    seg_mask = seg_mask_at_size(arrays[f"in.gen{i}"], gray.shape)
    np.testing.assert_array_equal(seg_mask, arrays[f"out.pred_mask{i}"])


def _tokenize(toy, case):
  return chat.tokenize_chat(
    toy,
    case["turns"],
    image_tokens=() if case["text_only"] else (case["num_image_token"],),
    num_codes=case["num_mask_token"],
    system_message=CONFIG["system_message"],
  )


@pytest.mark.parametrize("i", CONVERSATIONS)
def test_conversations(arrays, toy, i):
  got = _tokenize(toy, CONFIG["conversations"][i])
  prefix = f"out.conv{i}."
  np.testing.assert_array_equal(got.ids, arrays[prefix + "input_ids"])
  np.testing.assert_array_equal(got.labels, arrays[prefix + "labels"])


@pytest.mark.parametrize("i", CONVERSATIONS)
def test_padding(arrays, toy, i):
  pad = toy.token_ids.pad
  got = _tokenize(toy, CONFIG["conversations"][i])
  got = got.padded(CONFIG["max_len"], pad)
  prefix = f"out.conv{i}."
  np.testing.assert_array_equal(got.ids, arrays[prefix + "input_ids_padded"])
  np.testing.assert_array_equal(got.labels, arrays[prefix + "labels_padded"])
  np.testing.assert_array_equal(
    got.ids != pad, arrays[prefix + "attention_mask_padded"]
  )
  np.testing.assert_array_equal(
    got.position_ids(pad), arrays[prefix + "position_ids_padded"]
  )


def test_inference_prompt(arrays, toy):
  prompt = chat.chat_prompt(
    toy,
    [{"from": "human", "value": CONFIG["chat_question"]}],
    image_tokens=(CONFIG["chat_num_image_token"],),
    system_message=CONFIG["system_message"],
  )
  assert prompt.encode() == arrays["out.chat.prompt_utf8"].tobytes()
  np.testing.assert_array_equal(
    chat.encode_prompt(toy, prompt), arrays["out.chat.input_ids"]
  )


def test_evaluation_joins_expressions_as_the_authors_do():
  assert CONFIG["chat_question"] == chat.request_text(
    "referring", ["the left man"], "evaluation"
  )


def test_toy_tokenizer_of_the_recorder(toy):
  assert toy.token_ids.pad == 2
  assert toy.token_ids.bos == 1
  assert toy.token_ids.first_code == FIRST_CODE
