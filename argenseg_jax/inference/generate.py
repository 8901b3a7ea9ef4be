"""Generation: text until `<ge_start>`, then one pass a scale, in one program.

Rows of a batch share one cache timeline. A row that reaches `<ge_start>` waits
until every other row reached its own or finished; then all of them predict
their masks together. Slots in which a row waits are invalid for that row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from argenseg_jax.inference.sampler import GREEDY, Choice, choose_words
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.llm import KVCache


class Generated(NamedTuple):
  """What a batch of prompts was answered with."""

  tokens: (
    Array  # int32 [b text]; `<ge_end>` stands for a mask; 0 after the end.
  )
  text_length: Array  # int32 [b]: of `tokens`, their end included.
  codes: Array  # int32 [b m n]
  num_masks: Array  # int32 [b]
  log_probs: Array  # float32 [b m n]: of predicted codes, temperature 1.
  inputs: Array | None  # float32 [b m n d]: decoder inputs of the codes.
  hidden: Array | None  # float32 [b m n d]: what the code head read.
  positions: Array | None  # int32 [b m n]


class _State(NamedTuple):
  """Carry of the generation loops; all but the cache have rows first."""

  cache: KVCache
  last_hidden: Array  # [b d]: predicts the next token.
  token: Array  # int32 [b]: last token predicted.
  next_position: Array  # int32 [b]
  at_mask: Array  # bool [b]: waits at `<ge_start>`.
  finished: Array  # bool [b]
  tokens: Array  # int32 [b text]
  text_length: Array  # int32 [b]
  codes: Array  # int32 [b m n]
  log_probs: Array  # float32 [b m n]
  num_masks: Array  # int32 [b]
  key: Array | None  # Random key of what is yet to be drawn.
  trace: tuple | None


def prefill_prefix(
  model: ARGenSeg, tokens: Int[Array, "1 p"], vision: Float[Array, "1 v d"]
) -> KVCache:
  """Keys and values of what several prompts begin with, for `generate`.

  Args:
    model: bound parameters, plainly causal in the prompt.
    tokens: the common beginning, with its picture.
    vision: vision embeddings of the picture.

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
  *,
  tokens: Int[Array, "b t"],
  valid: Bool[Array, "b t"],
  vision: Float[Array, "b v d"] | None,
  prefix: KVCache | None = None,
  is_answer: Bool[Array, "b t"] | None = None,
  past_codes: Int[Array, "b p n"] | None = None,
  max_text: int,
  max_masks: int = 1,
  num_scales: int | None = None,
  start_with_mask: bool = False,
  guidance: float | None = None,
  stop_after_masks: bool = False,
  collect: bool = False,
  given_codes: Int[Array, "b m n"] | None = None,
  text_choice: Choice = GREEDY,
  code_choice: Choice = GREEDY,
  key: Key[Array, ""] | None = None,
) -> Generated:
  """Answers to left-padded prompts, greedy by default.

  Args:
    model: bound parameters.
    tokens: prompts up to and including the assistant's header, left-padded.
    valid: False in padding.
    vision: vision embeddings in the order of their placeholders; None where
      the prompts have none.
    prefix: from `prefill_prefix`: what stands before all prompts.
    is_answer: where prompts end with an answer's first words: True in those.
    past_codes: codes of the masks in a prompt's earlier answers, in order;
      `is_answer` is then True from the first of those answers on.
    max_text: most text tokens of an answer.
    max_masks: most masks of an answer; a further `<ge_start>` ends it.
    num_scales: predict only so many scales of a mask, the coarsest first, and
      leave the codes of the others 0; needs a mask that ends the answer.
    start_with_mask: take `<ge_start>` as said and skip the text before it.
    guidance: None, or the strength of guidance: rows are then pairs, all
      conditional rows first, then their unconditional twins, which follow the
      timing of the former.
    stop_after_masks: end an answer after its last possible mask.
    collect: also return inputs, hidden states and positions of all codes.
    given_codes: taken instead of the predicted ones, for `max_masks` masks of
      each row; with `collect`, this scores masks that are known.
    text_choice, code_choice: how words and codes are chosen.
    key: random key, needed unless both are greedy.
  """
  config, scales = model.config, model.scales
  ids = config.token_ids
  n = scales.num_codes
  width = config.llm.width
  dtype = model.llm.dtype
  forced = int(start_with_mask)
  one_mask = max_masks == 1 and stop_after_masks
  num_scales = len(scales) if num_scales is None else num_scales
  if num_scales < len(scales) and not one_mask:
    raise ValueError("a mask of fewer scales must end its answer.")
  if is_answer is None:
    is_answer = jnp.zeros_like(valid)
  if start_with_mask:
    tokens, valid, is_answer = (
      jnp.pad(x, ((0, 0), (0, 1)), constant_values=value)
      for x, value in ((tokens, ids.ge_start), (valid, True), (is_answer, True))
    )
  b, t = tokens.shape
  shared = 0 if prefix is None else prefix.valid.shape[1]
  # Rows out of step may each be the longest in one part of their answers.
  parts = max_masks - forced + (not stop_after_masks)
  slots = shared + t + parts * max_text + max_masks * (n + 1)
  rows = b // 2 if guidance is not None else b

  def lead(x):
    """Unconditional rows follow their conditional twins."""
    return x if guidance is None else jnp.concatenate((x[:rows], x[:rows]))

  cache = KVCache.empty(config.llm, b, slots, dtype)
  if prefix is not None:
    _require_causal(model)
    cache = cache.starting_with(prefix)
  positions = shared + jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
  reach = None
  if config.bidirectional_prompt or past_codes is not None:
    reach = model.reach(tokens, ~is_answer)
  embeddings = model.llm.embed(tokens)
  if vision is not None:
    embeddings = model.prompt_embeddings(tokens, vision)
  if past_codes is not None:
    past = model.vqvae.quantizer.scale_inputs(past_codes.reshape(-1, n))
    past = past.reshape(b, -1, *past.shape[1:])
    embeddings = model.with_slots(embeddings, tokens, past)
  hidden, cache = model.llm.extend(
    embeddings,
    cache,
    positions=positions,
    valid=valid,
    reach=reach,
    visible_slots=shared + t,
  )
  trace = None
  if collect:
    trace = (
      jnp.zeros((b, max_masks, n, width)),
      jnp.zeros((b, max_masks, n, width)),
      jnp.zeros((b, max_masks, n), jnp.int32),
    )
  state = _State(
    cache=cache,
    last_hidden=hidden[:, -1],
    token=jnp.full((b,), ids.ge_start, jnp.int32),
    next_position=shared - forced + jnp.sum(valid, axis=1, dtype=jnp.int32),
    at_mask=jnp.full((b,), start_with_mask),
    finished=jnp.zeros((b,), bool),
    tokens=jnp.zeros((b, max_text), jnp.int32),
    text_length=jnp.zeros((b,), jnp.int32),
    codes=jnp.zeros((b, max_masks, n), jnp.int32),
    log_probs=jnp.zeros((b, max_masks, n), jnp.float32),
    num_masks=jnp.zeros((b,), jnp.int32),
    key=key,
    trace=trace,
  )

  def say(state: _State, token, rows_speaking) -> _State:
    """Appends a token to the answers of some rows."""
    at = jnp.where(rows_speaking, state.text_length, max_text)
    written = state.tokens.at[jnp.arange(b), at].set(token, mode="drop")
    length = state.text_length + rows_speaking.astype(jnp.int32)
    full = length >= max_text
    return state._replace(
      tokens=written, text_length=length, finished=state.finished | full
    )

  def feed(state: _State, token, rows_fed) -> _State:
    """Runs one token of some rows through the decoder, if there are any."""

    def run(state: _State) -> _State:
      hidden, cache = model.llm.extend(
        model.llm.embed(token[:, None]),
        state.cache,
        positions=state.next_position[:, None],
        valid=rows_fed[:, None],
        visible_slots=shared + t + max_text if one_mask else None,
      )
      fed = rows_fed[:, None]
      return state._replace(
        cache=cache,
        last_hidden=jnp.where(fed, hidden[:, 0], state.last_hidden),
        next_position=state.next_position + rows_fed.astype(jnp.int32),
      )

    return jax.lax.cond(jnp.any(rows_fed), run, lambda s: s, state)

  def next_key(state: _State):
    if state.key is None:
      return state, None
    left, key = jax.random.split(state.key)
    return state._replace(key=left), key

  def text_step(state: _State) -> _State:
    active = ~(state.at_mask | state.finished)
    state, key = next_key(state)
    token = choose_words(model.llm.logits(state.last_hidden), text_choice, key)
    token = jnp.where(active, token, state.token)
    at_mask = active & lead(token == ids.ge_start)
    exhausted = at_mask & (state.num_masks >= max_masks)
    ended = active & lead(token == ids.im_end)
    state = state._replace(
      token=token,
      at_mask=state.at_mask | (at_mask & ~exhausted),
      finished=state.finished | ended | exhausted,
    )
    spoken = active & ~at_mask
    state = say(state, token, spoken)
    return feed(state, token, spoken & ~state.finished)

  def predict_scale(state, cache, partial, k, hidden, key):
    """Scale k of the masked rows; `hidden` where the decoder has run it."""
    masked = state.at_mask
    offset, count = scales.offsets[k], scales.counts[k]
    if k:
      feature = model.vqvae.quantizer.next_input(partial, k - 1)
      x = model.slot_embeddings(feature, offset)
    else:
      x = model.llm.embed(state.token[:, None])
    places = state.next_position[:, None] + jnp.arange(offset, offset + count)
    if hidden is None:
      # What this mask, and the text after it, will still need stays unseen.
      unused = n - offset - count + 1 + (not stop_after_masks) * max_text
      full = config.full_attention_in_scale
      hidden, cache = model.llm.extend(
        x,
        cache,
        positions=places,
        valid=jnp.broadcast_to(masked[:, None], (b, count)),
        reach=jnp.full((b, count), count - 1, jnp.int32) if full else None,
        visible_slots=slots - unused,
      )
    seen = (x.astype(jnp.float32), hidden.astype(jnp.float32), places)
    if guidance is not None:
      ramp = guidance * k / max(len(scales) - 1, 1)
      wide = hidden.astype(jnp.float32)
      mixed = (1 + ramp) * wide[:rows] - ramp * wide[rows:]
      hidden = mixed.astype(hidden.dtype)  # Rounded once.
    code, _, scores = scale_prediction(
      hidden,
      model.code_head.astype(hidden.dtype),
      model.vqvae.quantizer.codebook[...],
      key=None if key is None else jax.random.fold_in(key, k),
      temperature=code_choice.temperature,
      top_k=code_choice.top_k,
      return_scores=True,
    )
    code, log_prob = lead(code), lead(scores.logits - scores.log_sum_exp)
    if given_codes is not None:
      mask = jnp.minimum(state.num_masks, max_masks - 1)
      code = given_codes[jnp.arange(b), mask, offset : offset + count]
    return cache, code, log_prob, seen

  def mask_step(state: _State, *, fed: bool = False) -> _State:
    """Predicts a mask; `fed`: `<ge_start>` has been through the decoder."""
    state, key = next_key(state)
    masked = state.at_mask
    quantizer = model.vqvae.quantizer
    side, channels = scales.latent_side, config.vqvae.latent_channels
    partial = jnp.zeros((b, side, side, channels))
    codes, log_probs, traces = [], [], []
    cache = state.cache
    for k in range(num_scales):
      hidden = state.last_hidden[:, None] if fed and k == 0 else None
      cache, code, log_prob, seen = predict_scale(
        state, cache, partial, k, hidden, key
      )
      codes.append(code)
      log_probs.append(log_prob)
      traces.append(seen)
      if k + 1 < num_scales:
        partial = quantizer.add_scale(partial, code, k)
    place = (jnp.arange(b), jnp.where(masked, state.num_masks, max_masks))

    def write(old, parts):
      new = jnp.concatenate(parts, 1)
      rest = [(0, 0), (0, n - new.shape[1])] + [(0, 0)] * (new.ndim - 2)
      return old.at[place].set(jnp.pad(new, rest), mode="drop")

    trace = state.trace
    if collect:
      trace = tuple(
        write(old, part)
        for old, part in zip(trace, zip(*traces, strict=True), strict=True)
      )
    state = state._replace(
      cache=cache,
      codes=write(state.codes, codes),
      log_probs=write(state.log_probs, log_probs),
      num_masks=state.num_masks + masked.astype(jnp.int32),
      next_position=state.next_position + jnp.where(masked, n, 0),
      at_mask=jnp.zeros_like(masked),
      trace=trace,
    )
    end = jnp.full((b,), ids.ge_end, jnp.int32)
    state = say(state, end, masked)
    if stop_after_masks:
      done = masked & (state.num_masks >= max_masks)
      state = state._replace(finished=state.finished | done)
    return feed(state, end, masked & ~state.finished)

  def unfinished(state: _State):
    return ~jnp.all(state.finished)

  def answer_part(state: _State) -> _State:
    state = jax.lax.while_loop(
      lambda s: jnp.any(~(s.at_mask | s.finished)), text_step, state
    )
    return jax.lax.cond(jnp.any(state.at_mask), mask_step, lambda s: s, state)

  if start_with_mask:
    state = mask_step(state, fed=True)
  elif one_mask:
    state = answer_part(state)
  if not one_mask:
    state = jax.lax.while_loop(unfinished, answer_part, state)
  inputs, hidden, places = state.trace if collect else (None, None, None)
  return Generated(
    tokens=state.tokens,
    text_length=state.text_length,
    codes=state.codes,
    num_masks=state.num_masks,
    log_probs=state.log_probs,
    inputs=inputs,
    hidden=hidden,
    positions=places,
  )
