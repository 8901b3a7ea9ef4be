"""Generation: text until `<ge_start>`, then one pass a scale, in one program.

The prompts are prefilled here; `decoding` holds what is repeated after them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from argenseg_jax.inference.decoding import (
  Fixed,
  GenerationOptions,
  State,
  answer_part,
  mask_step,
  unfinished,
)
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.llm import KVCache


class Generated(NamedTuple):
  """What a batch of prompts was answered with."""

  tokens: Array  # int32 [b text]; a mask is `<ge_end>`, 0s follow the end.
  text_length: Array  # int32 [b]: of `tokens`, their end included.
  codes: Array  # int32 [b m n]
  num_masks: Array  # int32 [b]
  log_probs: Array  # float32 [b m n]: of predicted codes, temperature 1.
  inputs: Array | None  # float32 [b m n d]: decoder inputs of the codes.
  hidden: Array | None  # float32 [b m n d]: what the code head read.
  positions: Array | None  # int32 [b m n]


@jax.named_scope("prefill")
def prefill_prefix(
  model: ARGenSeg, tokens: Int[Array, "1 p"], vision: Float[Array, "1 v d"]
) -> KVCache:
  """Keys and values of what several prompts begin with, for `generate`.

  Args:
    model: bound parameters, plainly causal in the prompt.
    tokens: the common beginning, with its image.
    vision: vision embeddings of the image.

  Raises:
    ValueError: the model's prompts see their own ends.
  """
  _require_causal(model)
  length = tokens.shape[1]
  _, cache = model.llm.extend(
    model.prompt_embeddings(tokens, vision),
    KVCache.empty(model.config.llm, 1, length, model.llm.dtype),
    positions=jnp.arange(length)[None],
    valid=jnp.ones((1, length), bool),
  )
  return cache


def _require_causal(model: ARGenSeg) -> None:
  if model.config.bidirectional_prompt:
    raise ValueError(
      "this model's prompts see their own ends (bidirectional_prompt), so "
      "their beginnings cannot be shared; share vision embeddings instead."
    )


def generate(
  model: ARGenSeg,
  options: GenerationOptions,
  *,
  tokens: Int[Array, "b t"],
  valid: Bool[Array, "b t"],
  vision: Float[Array, "b v d"] | None,
  prefix: KVCache | None = None,
  is_answer: Bool[Array, "b t"] | None = None,
  past_codes: Int[Array, "b p n"] | None = None,
  given_codes: Int[Array, "b m n"] | None = None,
  key: Key[Array, ""] | None = None,
) -> Generated:
  """Answers to left-padded prompts.

  Args:
    model: bound parameters.
    options: lengths, guidance, and how words and codes are chosen.
    tokens: prompts up to and including the assistant's header, left-padded.
    valid: False in padding.
    vision: vision embeddings in the order of their placeholders; None where
      the prompts have none.
    prefix: from `prefill_prefix`: what stands before all prompts.
    is_answer: where prompts end with an answer's first words: True in those.
    past_codes: codes of the masks in a prompt's earlier answers, in order;
      `is_answer` is then True from the first of those answers on.
    given_codes: taken instead of the predicted ones, for `max_masks` masks of
      each row; with `options.collect`, this scores masks that are known.
    key: random key, needed unless both choices of `options` are greedy.

  Raises:
    ValueError: the options contradict each other, or a prefix is shared whose
      prompts see their own ends.
  """
  num_scales = options.count_scales(len(model.scales))
  if is_answer is None:
    is_answer = jnp.zeros_like(valid)
  if options.start_with_mask:
    start = model.config.token_ids.ge_start
    tokens, valid, is_answer = (
      jnp.pad(x, ((0, 0), (0, 1)), constant_values=value)
      for x, value in ((tokens, start), (valid, True), (is_answer, True))
    )
  b, t = tokens.shape
  shared = 0 if prefix is None else prefix.valid.shape[1]
  # Rows out of step may each be the longest in one part of their answers.
  parts = options.max_masks - options.start_with_mask
  parts += not options.stop_after_masks
  answer_slots = options.max_masks * (model.scales.num_codes + 1)
  fixed = Fixed(
    model=model,
    options=options,
    num_rows=b,
    num_scales=num_scales,
    prompt_slots=shared + t,
    slots=shared + t + parts * options.max_text + answer_slots,
    given_codes=given_codes,
  )
  state = _prefill(
    fixed, tokens, valid, vision, prefix, is_answer, past_codes, key
  )
  if options.start_with_mask:
    state = mask_step(fixed, state, fed=True)
  elif options.one_mask:
    state = answer_part(fixed, state)
  if not options.one_mask:
    state = jax.lax.while_loop(
      unfinished, functools.partial(answer_part, fixed), state
    )
  return _results(state)


def _results(state: State) -> Generated:
  inputs, hidden, positions = state.trace or (None, None, None)
  return Generated(
    tokens=state.tokens,
    text_length=state.text_length,
    codes=state.codes,
    num_masks=state.num_masks,
    log_probs=state.log_probs,
    inputs=inputs,
    hidden=hidden,
    positions=positions,
  )


@jax.named_scope("prefill")
def _prefill(
  fixed: Fixed,
  tokens: Int[Array, "b t"],
  valid: Bool[Array, "b t"],
  vision: Float[Array, "b v d"] | None,
  prefix: KVCache | None,
  is_answer: Bool[Array, "b t"],
  past_codes: Int[Array, "b p n"] | None,
  key: Key[Array, ""] | None,
) -> State:
  """Runs the prompts through the decoder."""
  model, shared = fixed.model, fixed.prompt_slots - tokens.shape[1]
  cache = KVCache.empty(
    model.config.llm, fixed.num_rows, fixed.slots, model.llm.dtype
  )
  if prefix is not None:
    _require_causal(model)
    cache = cache.starting_with(prefix)
  positions = shared + jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
  reach = None
  if model.config.bidirectional_prompt or past_codes is not None:
    reach = model.reach(tokens, ~is_answer)
  hidden, cache = model.llm.extend(
    _prompt_embeddings(model, tokens, vision, past_codes),
    cache,
    positions=positions,
    valid=valid,
    reach=reach,
    visible_slots=fixed.prompt_slots,
  )
  forced = int(fixed.options.start_with_mask)
  return _first_state(
    fixed,
    cache,
    hidden[:, -1],
    shared - forced + jnp.sum(valid, axis=1, dtype=jnp.int32),
    key,
  )


def _prompt_embeddings(
  model: ARGenSeg,
  tokens: Int[Array, "b t"],
  vision: Float[Array, "b v d"] | None,
  past_codes: Int[Array, "b p n"] | None,
) -> Float[Array, "b t d"]:
  """Words, vision embeddings, and the masks of earlier answers."""
  embeddings = model.llm.embed(tokens)
  if vision is not None:
    embeddings = model.prompt_embeddings(tokens, vision)
  if past_codes is not None:
    flat = past_codes.reshape(-1, past_codes.shape[-1])
    past = model.vqvae.quantizer.scale_inputs(flat)
    past = past.reshape(len(tokens), -1, *past.shape[1:])
    embeddings = model.with_slots(embeddings, tokens, past)
  return embeddings


def _first_state(
  fixed: Fixed,
  cache: KVCache,
  last_hidden: Float[Array, "b d"],
  next_position: Int[Array, "b"],
  key: Key[Array, ""] | None,
) -> State:
  """Nothing is said yet."""
  config, options = fixed.model.config, fixed.options
  b, n, width = fixed.num_rows, fixed.model.scales.num_codes, config.llm.width
  max_masks, trace = options.max_masks, None
  if options.collect:
    trace = (
      jnp.zeros((b, max_masks, n, width)),
      jnp.zeros((b, max_masks, n, width)),
      jnp.zeros((b, max_masks, n), jnp.int32),
    )
  return State(
    cache=cache,
    last_hidden=last_hidden,
    token=jnp.full((b,), config.token_ids.ge_start, jnp.int32),
    next_position=next_position,
    at_mask=jnp.full((b,), options.start_with_mask),
    finished=jnp.zeros((b,), bool),
    tokens=jnp.zeros((b, options.max_text), jnp.int32),
    text_length=jnp.zeros((b,), jnp.int32),
    codes=jnp.zeros((b, max_masks, n), jnp.int32),
    log_probs=jnp.zeros((b, max_masks, n), jnp.float32),
    num_masks=jnp.zeros((b,), jnp.int32),
    key=key,
    trace=trace,
  )
