"""Generation: text until `<ge_start>`, then one pass a scale, in one program.

Rows of a batch share one cache timeline. A row that reaches `<ge_start>` waits
until every other row reached its own or finished; then all of them predict
their masks together. Slots in which a row waits are invalid for that row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.llm import KVCache


class Generated(NamedTuple):
  """What a batch of prompts was answered with."""

  tokens: (
    Array  # int32 [b text]; `<ge_end>` stands for a mask; 0 after the end.
  )
  codes: Array  # int32 [b m n]
  num_masks: Array  # int32 [b]
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
  num_masks: Array  # int32 [b]
  trace: tuple | None


def generate(
  model: ARGenSeg,
  *,
  tokens: Int[Array, "b t"],
  valid: Bool[Array, "b t"],
  images: Float[Array, "b i h w 3"],
  max_text: int,
  max_masks: int = 1,
  start_with_mask: bool = False,
  guidance: float | None = None,
  stop_after_masks: bool = False,
  collect: bool = False,
  given_codes: Int[Array, "b m n"] | None = None,
) -> Generated:
  """Greedy answers to left-padded prompts.

  Args:
    model: bound parameters.
    tokens: prompts up to and including the assistant's header, left-padded.
    valid: False in padding.
    images: normalised pixels, in the order of their placeholders.
    max_text: most text tokens of an answer.
    max_masks: most masks of an answer; a further `<ge_start>` ends it.
    start_with_mask: take `<ge_start>` as said and skip the text before it (the
      prompt may end with the answer's words).
    guidance: None, or the strength of guidance: rows are then pairs, all
      conditional rows first, then their unconditional twins, which follow the
      timing of the former.
    stop_after_masks: end an answer after its last possible mask.
    collect: also return inputs, hidden states and positions of all codes.
    given_codes: taken instead of the predicted ones, for `max_masks` masks of
      each row; with `collect`, this scores masks that are known.
  """
  config, scales = model.config, model.scales
  ids = config.token_ids
  b, t = tokens.shape
  n = scales.num_codes
  width = config.llm.width
  # Rows out of step may each be the longest in one part of their answers.
  slots = t + (max_masks + 1) * max_text + max_masks * (n + 1)
  dtype = model.llm.dtype
  rows = b // 2 if guidance is not None else b

  def lead(x):
    """Unconditional rows follow their conditional twins."""
    return x if guidance is None else jnp.concatenate((x[:rows], x[:rows]))

  positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
  reach = None
  if config.bidirectional_prompt:
    reach = jnp.full((b, t), t - 1, jnp.int32)
  hidden, cache = model.llm.extend(
    model.prompt_embeddings(tokens, model.vision_embeddings(images)),
    KVCache.empty(config.llm, b, slots, dtype),
    positions=positions,
    valid=valid,
    reach=reach,
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
    next_position=jnp.sum(valid, axis=1, dtype=jnp.int32),
    at_mask=jnp.full((b,), start_with_mask),
    finished=jnp.zeros((b,), bool),
    tokens=jnp.zeros((b, max_text), jnp.int32),
    text_length=jnp.zeros((b,), jnp.int32),
    codes=jnp.zeros((b, max_masks, n), jnp.int32),
    num_masks=jnp.zeros((b,), jnp.int32),
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
    """Runs one token of some rows through the decoder."""
    hidden, cache = model.llm.extend(
      model.llm.embed(token[:, None]),
      state.cache,
      positions=state.next_position[:, None],
      valid=rows_fed[:, None],
    )
    return state._replace(
      cache=cache,
      last_hidden=jnp.where(rows_fed[:, None], hidden[:, 0], state.last_hidden),
      next_position=state.next_position + rows_fed.astype(jnp.int32),
    )

  def text_step(state: _State) -> _State:
    active = ~(state.at_mask | state.finished)
    logits = jnp.einsum(
      "bd,vd->bv",
      state.last_hidden,
      model.llm.head.astype(dtype),
      preferred_element_type=jnp.float32,
    )
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
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

  def mask_step(state: _State) -> _State:
    masked = state.at_mask
    partial = jnp.zeros(
      (b, scales.latent_side, scales.latent_side, config.vqvae.latent_channels)
    )
    quantizer = model.vqvae.quantizer
    x = model.llm.embed(state.token[:, None])
    codes, traces = [], []
    cache = state.cache
    for k, (offset, count) in enumerate(
      zip(scales.offsets, scales.counts, strict=True)
    ):
      if k:
        x = model.slot_embeddings(quantizer.next_input(partial, k - 1), offset)
      places = state.next_position[:, None] + jnp.arange(offset, offset + count)
      full = config.full_attention_in_scale
      hidden, cache = model.llm.extend(
        x,
        cache,
        positions=places,
        valid=jnp.broadcast_to(masked[:, None], (b, count)),
        reach=jnp.full((b, count), count - 1, jnp.int32) if full else None,
      )
      traces.append((x.astype(jnp.float32), hidden.astype(jnp.float32), places))
      if guidance is not None:
        ramp = guidance * k / max(len(scales) - 1, 1)
        hidden = (1 + ramp) * hidden[:rows] - ramp * hidden[rows:]
      code, _ = scale_prediction(
        hidden, model.code_head.astype(hidden.dtype), quantizer.codebook[...]
      )
      code = lead(code)
      if given_codes is not None:
        mask = jnp.minimum(state.num_masks, max_masks - 1)
        given = given_codes[jnp.arange(b), mask]
        code = given[:, offset : offset + count]
      codes.append(code)
      partial = quantizer.add_scale(partial, code, k)
    place = (jnp.arange(b), jnp.where(masked, state.num_masks, max_masks))
    trace = state.trace
    if collect:
      parts = [jnp.concatenate(part, 1) for part in zip(*traces, strict=True)]
      trace = tuple(
        old.at[place].set(new, mode="drop")
        for old, new in zip(trace, parts, strict=True)
      )
    state = state._replace(
      cache=cache,
      codes=state.codes.at[place].set(jnp.concatenate(codes, 1), mode="drop"),
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

  state = jax.lax.while_loop(unfinished, answer_part, state)
  inputs, hidden, places = state.trace if collect else (None, None, None)
  return Generated(
    state.tokens, state.codes, state.num_masks, inputs, hidden, places
  )
