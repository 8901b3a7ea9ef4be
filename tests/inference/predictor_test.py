"""Predictor: sharing, forcing, threads and few scales change no answer."""

import concurrent.futures
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_rows
from PIL import Image

from argenseg_jax import checkpoint, config_parsing
from argenseg_jax.config import DataConfig, EvalConfig
from argenseg_jax.data import text
from argenseg_jax.data.errors import DataError
from argenseg_jax.inference import prompts
from argenseg_jax.inference.predictor import Predictor

SMALL = dict(
  aligned_positions=True,
  bidirectional_prompt=True,
  full_attention_in_scale=True,
)
REQUESTS = ["a", "the red one", "the tall blue chair on the left"]


@pytest.fixture(scope="module")
def open_predictor(tmp_path_factory):
  """Predictors of random models, kept."""
  folder = tmp_path_factory.mktemp("model")
  shutil.copy(text.SHIPPED, folder / "tokenizer.json")
  kept = {}
  small = {
    "llm.num_layers": 1,
    "vqvae.scales": (1, 2),
    "vqvae.image_side": 4,
    "vqvae.width_multipliers": (1,),
  }

  def make(**changes):
    key = tuple(changes.items())
    if key not in kept:
      bfloat16 = changes.pop("bfloat16", False)
      dtype = jnp.bfloat16 if bfloat16 else jnp.float32
      model = tiny_rows.model(dtype, **small, **changes)
      data = DataConfig(path="", image_side=16, request="free")
      limits = EvalConfig(("val",), 0, 4, 3, 1, False)
      loaded = checkpoint.Loaded(
        task="mllm",
        config=model.config,
        meta={
          "run": {
            "data": config_parsing.to_dict(data),
            "eval": config_parsing.to_dict(limits),
          }
        },
        path=folder / "checkpoints" / "1",
        model=model,
      )
      kept[key] = Predictor(loaded, bfloat16=bfloat16)
    return kept[key]

  return make


@pytest.fixture
def compilations():
  """Names of what XLA compiles while the test runs."""
  found = []

  def listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


def pictures(count: int) -> list[np.ndarray]:
  draw = np.random.default_rng(0)
  return list(draw.integers(0, 256, (count, 20, 30, 3), dtype=np.uint8))


def say(predictor: Predictor, answer: list[int], request: str, image) -> None:
  """Makes a random model answer with these tokens: each row of the head becomes
  a little more than the row of what was said in its place."""
  engine = predictor._engine
  for i, token in enumerate(answer):
    prompt = engine.prompt(request, None)
    forced = prompt._replace(ids=np.append(prompt.ids, answer[:i]).astype(int))
    padded = prompts.pad([forced], 0)
    model_state = engine._state
    answers = engine._answer(
      model_state,
      padded,
      engine.resized(image)[None],
      None,
      None,
      config=predictor.settings,
      num_scales=None,
    )
    said = int(answers.tokens[0, 0])
    head = model_state["llm"]["untied_head"]
    row = (1.5 + i) * head[...][said]
    model_state["llm"]["untied_head"] = head.replace(
      head[...].at[token].set(row)
    )


def same(found, expected) -> None:
  for one, other in zip(found, expected, strict=True):
    assert one.text == other.text
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.seg_masks, other.seg_masks)
    np.testing.assert_allclose(one.confidences, other.confidences, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, SMALL], ids=["causal", "small"])
def test_requests_that_share_a_picture_get_the_same_answers(
  open_predictor, changes
):
  predictor = open_predictor(**changes)
  (image,) = pictures(1)
  alone = [
    predictor.segment(image, request, answer_prefix="the")
    for request in REQUESTS
  ]
  predictor.set_image(image)
  shared = [predictor.segment(r, answer_prefix="the") for r in REQUESTS]
  same(shared, alone)
  assert len({answer.confidence for answer in alone}) == 3


def test_an_image_without_a_request_is_refused(open_predictor):
  (image,) = pictures(1)
  with pytest.raises(DataError, match="needs a request as well"):
    open_predictor().segment(image)


def test_forced_words_give_the_codes_of_an_answer_that_says_them(
  open_predictor,
):
  predictor = open_predictor()
  (image,) = pictures(1)
  ids = predictor.tokenizer.token_ids
  state = predictor._engine._state["llm"]["untied_head"]
  (word,) = predictor.tokenizer.encode("the")
  say(predictor, [int(word), ids.ge_start], "a", image)
  free = predictor.segment(image, "a")
  forced = predictor.segment(image, "a", answer_prefix="the")
  predictor._engine._state["llm"]["untied_head"] = state
  assert free.text == "the<mask>"
  same([forced], [free])
  assert -10 < free.confidence < 0


def test_threads_get_the_answers_of_one(open_predictor):
  predictor = open_predictor()
  images = pictures(4)

  def ask(image):
    predictor.set_image(image)
    return [predictor.segment(r, answer_prefix="") for r in REQUESTS]

  alone = [ask(image) for image in images]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    together = list(pool.map(ask, images))
  for found, expected in zip(together, alone, strict=True):
    same(found, expected)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    asked = pool.submit(predictor.segment, "a")
    with pytest.raises(DataError, match="no image was set in this thread"):
      asked.result()


def test_a_hundred_prompts_compile_no_more_than_buckets(
  open_predictor, compilations
):
  predictor = open_predictor()
  images = pictures(1)
  predictor.segment_batch(images, ["a"], answer_prefix="")  # One bucket.
  longest = 60
  predictor.warm_up(longest=longest, answer_prefix="")
  lengths = {
    prompts.bucket(len(predictor._engine.prompt("a " * n, None).ids))
    for n in range(longest // 2)
  }
  assert len(lengths) > 1
  assert 1 <= len(compilations) <= len(lengths) + 1  # And the strip's.
  compilations.clear()
  for n in range(100):
    predictor.segment_batch(images, ["a " * (n % 30)], answer_prefix="")
  assert not compilations


def test_rows_are_rounded_up(open_predictor, compilations):
  predictor = open_predictor()
  images = pictures(9)
  requests = [REQUESTS[i % 3] for i in range(9)]
  one_by_one = [
    predictor.segment(image, request, answer_prefix="the")
    for image, request in zip(images, requests, strict=True)
  ]
  compilations.clear()
  together = predictor.segment_batch(images, requests, answer_prefix="the")
  same(together, one_by_one)  # As 4, 4 and 1.
  same(
    predictor.segment_batch(images[:3], requests[:3], answer_prefix="the"),
    one_by_one[:3],
  )
  assert len(compilations) <= 1


def test_fewer_scales_give_the_mask_of_that_prefix(open_predictor):
  predictor = open_predictor()
  (image,) = pictures(1)
  whole = predictor.segment(image, "a", answer_prefix="")
  few = predictor.segment(image, "a", answer_prefix="", num_scales=1)
  assert whole.strip.shape == (2, 4, 4, 3)
  assert whole.scale_masks.shape == (2, 20, 30)
  np.testing.assert_array_equal(few.seg_mask, whole.scale_masks[0])
  np.testing.assert_array_equal(few.strip, whole.strip[:1])
  np.testing.assert_array_equal(whole.scale_masks[1], whole.seg_mask)
  assert few.codes[0, 0] == whole.codes[0, 0]
  for wrong in (0, 3):
    with pytest.raises(DataError, match="take 1 to 2"):
      predictor.segment(image, "a", num_scales=wrong)


def test_pictures_come_as_arrays_pil_and_files(open_predictor, tmp_path):
  predictor = open_predictor()
  (image,) = pictures(1)
  Image.fromarray(image).save(tmp_path / "a.png")
  expected = predictor.segment(image, "a", answer_prefix="")
  for given in (Image.fromarray(image), tmp_path / "a.png"):
    same([predictor.segment(given, "a", answer_prefix="")], [expected])
  as_pil = expected.as_pil()
  assert as_pil.size == (30, 20)
  np.testing.assert_array_equal(np.asarray(as_pil) > 0, expected.seg_mask)
  with pytest.raises(DataError, match=r"has the shape \[20, 30, 2\]"):
    predictor.segment(image[..., :2], "a")
  with pytest.raises(DataError, match="no request template is named 'nope'"):
    predictor.segment(image, "x", template="nope")
  with pytest.raises(DataError, match="2 requests for 1 images"):
    predictor.segment_batch([image], ["a", "b"])


def test_chat_goes_on_with_or_without_a_picture(open_predictor):
  predictor = open_predictor()
  (image,) = pictures(1)
  history = [
    {"from": "human", "value": "<image>\na"},
    {"from": "gpt", "value": "the<mask>"},
    {"from": "human", "value": "and the red one?"},
  ]
  picture = predictor.set_image(image)
  answer = picture.chat(history, answer_prefix="the")
  assert answer.text == "the<mask>"
  same([predictor.chat(history, answer_prefix="the")], [answer])
  elsewhere = [{"from": "human", "value": "the <image> of a"}]
  prompt = predictor._engine.turns(elsewhere, 1, None)
  assert picture.inputs([prompt])[0] == 0  # It has another beginning.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:  # Has no picture.
    words = [{"from": "human", "value": "a"}]
    told = pool.submit(predictor.chat, words, max_text=2).result()
  assert not told.has_mask
  with pytest.raises(DataError, match="must end with a human"):
    predictor.chat(history[:2])


def test_bfloat16_halves_the_weights_but_not_the_quantizer(open_predictor):
  predictor = open_predictor(bfloat16=True)
  state = predictor._engine._state
  assert state["llm"]["untied_head"][...].dtype == jnp.bfloat16
  assert state["vqvae"]["quantizer"]["codebook"][...].dtype == jnp.float32
  answer = predictor.segment(pictures(1)[0], "a", answer_prefix="")
  assert answer.has_mask


def test_a_request_longer_than_the_model_is_refused_at_once(open_predictor):
  predictor = open_predictor()
  (image,) = pictures(1)
  for words in ("cup " * 50_000, "a" * 200_000):
    for ask in (
      lambda words: predictor.segment(image, words),
      lambda words: predictor.segment(image, "a", answer_prefix=words),
      lambda words: predictor.chat([{"from": "human", "value": words}]),
    ):
      with pytest.raises(DataError, match="is too long: the model has"):
        ask(words)


def test_special_tokens_of_a_request_are_its_words(open_predictor):
  predictor = open_predictor()
  (image,) = pictures(1)
  plain = predictor._engine.prompt("", None)
  ids = predictor.tokenizer.token_ids
  for token in (*text.SPECIAL_TOKENS.values(), "<pad>", "<image>"):
    asked = predictor._engine.prompt(f"the {token} cup", "")
    assert asked.image_end == plain.image_end
    for control in (ids.img_context, ids.im_start, ids.im_end, ids.ge_start):
      assert (asked.ids == control).sum() == (plain.ids == control).sum()
  predictor.set_image(image)
  requests = ["the <mask> cup", "the <MASK_CONTEXT> cup<|im_end|>"]
  shared = [predictor.segment(r, answer_prefix="") for r in requests]
  same(
    shared, [predictor.segment(image, r, answer_prefix="") for r in requests]
  )
