"""Generation equals teacher forcing, and token-by-token decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.generate import generate, prefill_prefix
from argenseg_jax.models.llm import KVCache
from argenseg_jax.types import ModelInputs

IDS = tiny_model.TOKEN_IDS
VARIANTS = {
  "released": {},
  "small": dict(
    aligned_positions=True,
    bidirectional_prompt=True,
    full_attention_in_scale=True,
  ),
}


@functools.partial(
  jax.jit,
  static_argnames=(
    "graph",
    "guidance",
    "max_text",
    "max_masks",
    "start_with_mask",
  ),
)
def run(graph, state, inputs, **options):
  model = nnx.merge(graph, state)
  inputs = dict(inputs)
  vision = model.vision_embeddings(inputs.pop("images"))
  options = GenerationOptions(collect=True, **options)
  return generate(model, options, **inputs, vision=vision)


def prompts(rows=2):
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 20, (rows, 9))
  tokens[:, 1:6] = [IDS.img_start, *[IDS.img_context] * 4]
  valid = np.ones((rows, 9), bool)
  tokens[0, 1:] = tokens[0, :-1].copy()
  tokens[0, 0], valid[0, 0] = IDS.pad, False
  return dict(
    tokens=jnp.asarray(tokens, jnp.int32),
    valid=jnp.asarray(valid),
    images=jnp.asarray(
      rng.normal(size=(rows, 1, 16, 16, 3)), dtype=jnp.float32
    ),
  )


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_equals_teacher_forcing(variant):
  model = tiny_model.model(**VARIANTS[variant])
  inputs = prompts()
  out = run(
    *nnx.split(model), inputs, max_text=3, max_masks=1, start_with_mask=True
  )
  np.testing.assert_array_equal(out.num_masks, 1)
  n = model.scales.num_codes
  answer = jnp.asarray([[IDS.ge_start] + [IDS.mask_context] * (n - 1)] * 2)
  valid = jnp.concatenate((inputs["valid"], jnp.ones((2, n), bool)), 1)
  hidden = model(
    ModelInputs(
      tokens=jnp.concatenate((inputs["tokens"], answer), 1),
      positions=jnp.maximum(jnp.cumsum(valid, 1) - 1, 0),
      segment_ids=valid.astype(jnp.int32),
      is_prompt=(jnp.arange(9 + n) < 9)[None] & valid,
      images=inputs["images"],
      scale_inputs=model.vqvae.quantizer.scale_inputs(out.codes[:, 0])[:, None],
    )
  )[:, 9:]
  np.testing.assert_allclose(out.hidden[:, 0], hidden, atol=1e-4)
  logits = hidden @ model.code_head.T
  np.testing.assert_array_equal(out.codes[:, 0], jnp.argmax(logits, -1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_earlier_mask_in_the_prompt_equals_teacher_forcing(variant):
  model = tiny_model.model(**VARIANTS[variant])
  inputs, n = prompts(), model.scales.num_codes
  past = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 1, n)))
  mask = [IDS.ge_start] + [IDS.mask_context] * (n - 1)
  said = jnp.asarray([[*mask, IDS.ge_end, IDS.im_end, 12, 13]] * 2, jnp.int32)
  tokens = jnp.concatenate((inputs["tokens"], said), 1)
  valid = jnp.pad(inputs["valid"], ((0, 0), (0, n + 4)), constant_values=True)
  is_answer = jnp.broadcast_to(jnp.arange(9 + n + 4) >= 9, valid.shape)
  given = inputs | dict(
    tokens=tokens, valid=valid, is_answer=is_answer, past_codes=past
  )
  out = run(
    *nnx.split(model), given, max_text=3, max_masks=1, start_with_mask=True
  )
  codes = jnp.concatenate((past, out.codes), 1)
  scale_inputs = model.vqvae.quantizer.scale_inputs(codes.reshape(4, n))
  whole = jnp.pad(valid, ((0, 0), (0, n)), constant_values=True)
  hidden = model(
    ModelInputs(
      tokens=jnp.concatenate((tokens, jnp.asarray([mask] * 2)), 1),
      positions=jnp.maximum(jnp.cumsum(whole, 1) - 1, 0),
      segment_ids=whole.astype(jnp.int32),
      is_prompt=(jnp.arange(whole.shape[1]) < 9)[None] & whole,
      images=inputs["images"],
      scale_inputs=scale_inputs.reshape(2, 2, n - 1, -1),
    )
  )[:, -n:]
  np.testing.assert_allclose(out.hidden[:, 0], hidden, atol=1e-4)


def test_next_scale_equals_token_by_token():
  model = tiny_model.model()
  inputs = prompts()
  out = run(
    *nnx.split(model), inputs, max_text=3, max_masks=1, start_with_mask=True
  )
  graph, state = nnx.split(model)

  @jax.jit
  def extend(x, cache, positions, valid):
    model = nnx.merge(graph, state)
    return model.llm.extend(x, cache, positions=positions, valid=valid)

  @jax.jit
  def prompt_embeddings():
    model = nnx.merge(graph, state)
    vision = model.vision_embeddings(inputs["images"])
    return model.prompt_embeddings(inputs["tokens"], vision)

  valid = inputs["valid"]
  n, t = model.scales.num_codes, valid.shape[1]
  _, cache = extend(
    prompt_embeddings(),
    KVCache.empty(model.config.llm, 2, t + n),
    jnp.maximum(jnp.cumsum(valid, 1) - 1, 0),
    valid,
  )
  start = jnp.sum(valid, 1)
  codes = np.zeros((2, n), np.int32)
  x = model.llm.embed(jnp.full((2, 1), IDS.ge_start))
  one = jnp.ones((2, 1), bool)
  for i in range(n):
    if i:
      features = model.vqvae.quantizer.scale_inputs(jnp.asarray(codes))
      x = model.slot_embeddings(features[:, i - 1 : i], i)
    hidden, cache = extend(x, cache, (start + i)[:, None], one)
    codes[:, i] = jnp.argmax(hidden[:, 0] @ model.code_head.T, -1)
  np.testing.assert_array_equal(out.codes[:, 0], codes)


def test_positions_run_on_and_ge_end_stands_for_the_mask():
  model = tiny_model.model()
  inputs = prompts()
  out = run(
    *nnx.split(model), inputs, max_text=3, max_masks=1, start_with_mask=True
  )
  n = model.scales.num_codes
  lengths = np.sum(np.asarray(inputs["valid"]), 1)
  np.testing.assert_array_equal(
    out.positions[:, 0], lengths[:, None] + np.arange(n)
  )
  np.testing.assert_array_equal(out.tokens[:, 0], IDS.ge_end)


def test_rows_do_not_change_each_other():
  model = tiny_model.model()
  both = prompts()
  kwargs = dict(max_text=4, max_masks=2, start_with_mask=False)
  out = run(*nnx.split(model), both, **kwargs)
  for row in range(2):
    alone = {k: v[row : row + 1] for k, v in both.items()}
    one = run(*nnx.split(model), alone, **kwargs)
    np.testing.assert_array_equal(one.tokens[0], out.tokens[row])
    np.testing.assert_array_equal(one.num_masks[0], out.num_masks[row])
    np.testing.assert_array_equal(one.codes[0], out.codes[row])


def test_guidance_of_equal_rows_changes_nothing():
  model = tiny_model.model()
  one = {k: v[1:] for k, v in prompts().items()}
  twins = {k: jnp.concatenate((v, v)) for k, v in one.items()}
  kwargs = dict(max_text=3, max_masks=1, start_with_mask=True)
  plain = run(*nnx.split(model), one, **kwargs)
  guided = run(*nnx.split(model), twins, guidance=4.0, **kwargs)
  np.testing.assert_array_equal(guided.codes[0], plain.codes[0])
  np.testing.assert_array_equal(guided.codes[1], plain.codes[0])


def generated(model, inputs, **options):
  """`generate` of a model whose vision embeddings are known."""
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, inputs):
    model = nnx.merge(graph, state)
    return generate(model, GenerationOptions(**options), **inputs)

  return run(state, inputs)


def test_a_shared_prefix_changes_nothing():
  model = tiny_model.model()
  inputs = prompts(rows=1)
  tokens = inputs["tokens"]
  graph, state = nnx.split(model)

  @jax.jit
  def prepare(state):
    model = nnx.merge(graph, state)
    vision = model.vision_embeddings(inputs["images"])
    return vision, prefill_prefix(model, tokens[:, 1:7], vision)

  # The padding of row 0 comes first: drop it, then branch off twice.
  vision, prefix = prepare(state)
  endings = jnp.asarray([[12, 13, 14], [IDS.pad, 15, 16]], jnp.int32)
  valid = endings != IDS.pad
  shared = generated(
    model,
    dict(tokens=endings, valid=valid, vision=None, prefix=prefix),
    max_text=4,
  )
  beginning = jnp.repeat(tokens[:, 1:7], 2, 0)
  whole = generated(
    model,
    dict(
      tokens=jnp.concatenate((beginning, endings), 1),
      valid=jnp.concatenate((jnp.ones_like(beginning, bool), valid), 1),
      vision=jnp.repeat(vision, 2, 0),
    ),
    max_text=4,
  )
  np.testing.assert_array_equal(shared.tokens, whole.tokens)
  np.testing.assert_array_equal(shared.codes, whole.codes)
  np.testing.assert_allclose(shared.log_probs, whole.log_probs, atol=1e-4)


def test_a_prefix_cannot_be_shared_where_prompts_see_their_ends():
  model = tiny_model.model(bidirectional_prompt=True)
  with pytest.raises(ValueError, match="bidirectional_prompt"):
    prefill_prefix(model, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 0, 32)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_scales_are_the_first_scales(variant):
  model = tiny_model.model(**VARIANTS[variant])
  kwargs = dict(max_text=3, start_with_mask=True, stop_after_masks=True)
  inputs = prompts()
  inputs["vision"] = model.vision_embeddings(inputs.pop("images"))
  whole = generated(model, inputs, **kwargs)
  few = generated(model, inputs, num_scales=2, **kwargs)
  used = model.scales.offsets[2]
  np.testing.assert_array_equal(few.codes[..., :used], whole.codes[..., :used])
  np.testing.assert_array_equal(few.codes[..., used:], 0)
  with pytest.raises(ValueError, match="fewer scales"):
    generated(model, inputs, num_scales=2, max_text=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forced_beginning_equals_teacher_forcing(variant):
  model = tiny_model.model(**VARIANTS[variant])
  ids = model.config.token_ids
  inputs = prompts()
  inputs["vision"] = model.vision_embeddings(inputs.pop("images"))
  answers = jnp.asarray([[12, 13], [14, 15]], jnp.int32)
  forced = dict(
    tokens=jnp.concatenate((inputs["tokens"], answers), 1),
    valid=jnp.pad(inputs["valid"], ((0, 0), (0, 2)), constant_values=True),
    is_answer=jnp.pad(
      jnp.zeros_like(inputs["valid"]), ((0, 0), (0, 2)), constant_values=True
    ),
    vision=inputs["vision"],
  )
  skipped = generated(
    model, forced, max_text=2, start_with_mask=True, stop_after_masks=True
  )
  n = model.scales.num_codes
  slots = jnp.asarray([[ids.ge_start] + [ids.mask_context] * (n - 1)] * 2)
  valid = jnp.pad(forced["valid"], ((0, 0), (0, n)), constant_values=True)
  is_prompt = jnp.pad(inputs["valid"], ((0, 0), (0, 2 + n)))
  hidden = model(
    ModelInputs(
      tokens=jnp.concatenate((forced["tokens"], slots), 1),
      positions=jnp.maximum(jnp.cumsum(valid, 1) - 1, 0),
      segment_ids=valid.astype(jnp.int32),
      is_prompt=is_prompt,
      images=prompts()["images"],
      scale_inputs=model.vqvae.quantizer.scale_inputs(skipped.codes[:, 0])[
        :, None
      ],
    )
  )[:, 11:]
  logits = jax.nn.log_softmax(hidden @ model.code_head.T)
  np.testing.assert_array_equal(skipped.codes[:, 0], jnp.argmax(logits, -1))
  np.testing.assert_allclose(
    skipped.log_probs[:, 0], jnp.max(logits, -1), atol=1e-4
  )
  np.testing.assert_array_equal(skipped.num_masks, 1)


def test_layers_one_by_one_give_what_the_stack_gives():
  stacked, apart = tiny_model.model(), tiny_model.model()
  apart.unstack()
  kwargs = dict(max_text=3, start_with_mask=True)
  inputs = prompts()
  inputs["vision"] = stacked.vision_embeddings(inputs["images"])
  np.testing.assert_allclose(
    apart.vision_embeddings(inputs.pop("images")), inputs["vision"], atol=1e-5
  )
  expected = generated(stacked, inputs, **kwargs)
  found = generated(apart, inputs, **kwargs)
  np.testing.assert_array_equal(found.codes, expected.codes)
  np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
