"""Steps of generation: a word or a mask of every row that is at it.

Rows of a batch share one cache timeline. A row that reaches `<ge_start>` waits
until every other row reached its own or finished; then all of them predict
their masks together. Slots in which a row waits are invalid for that row.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from argenseg_jax.inference.sampler import GREEDY, Choice, choose_words
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.llm import KVCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
  """How answers are generated, greedily by default.

  Attributes:
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
    text_choice, code_choice: how words and codes are chosen.
  """

  max_text: int
  max_masks: int = 1
  num_scales: int | None = None
  start_with_mask: bool = False
  guidance: float | None = None
  stop_after_masks: bool = False
  collect: bool = False
  text_choice: Choice = GREEDY
  code_choice: Choice = GREEDY

  @property
  def one_mask(self) -> bool:
    """Whether an answer ends with its only mask."""
    return self.max_masks == 1 and self.stop_after_masks

  def count_scales(self, whole: int) -> int:
    """How many of the `whole` scales are predicted.

    Raises:
      ValueError: too few for what follows a mask.
    """
    count = whole if self.num_scales is None else self.num_scales
    if count < whole and not self.one_mask:
      raise ValueError("a mask of fewer scales must end its answer.")
    return count


@dataclasses.dataclass(frozen=True)
class Fixed:
  """What no step of a generation changes.

  Attributes:
    num_rows: b.
    num_scales: that are predicted.
    prompt_slots: of the cache: those of prefix and prompt.
    slots: of the cache, in all.
    given_codes: see `generate`.
  """

  model: ARGenSeg
  options: GenerationOptions
  num_rows: int
  num_scales: int
  prompt_slots: int
  slots: int
  given_codes: Array | None

  def lead(self, x: Array) -> Array:
    """Unconditional rows follow their conditional twins."""
    if self.options.guidance is None:
      return x
    half = self.num_rows // 2
    return jnp.concatenate((x[:half], x[:half]))


class State(NamedTuple):
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
  trace: tuple[Array, Array, Array] | None  # Inputs, hidden, positions.


def unfinished(state: State) -> Bool[Array, ""]:
  return ~jnp.all(state.finished)


def answer_part(fixed: Fixed, state: State) -> State:
  """Text until every row waits or has finished, then masks of all that wait."""
  state = jax.lax.while_loop(
    lambda s: jnp.any(~(s.at_mask | s.finished)),
    functools.partial(_text_step, fixed),
    state,
  )
  return jax.lax.cond(
    jnp.any(state.at_mask),
    functools.partial(mask_step, fixed),
    lambda s: s,
    state,
  )


@jax.named_scope("text")
def _text_step(fixed: Fixed, state: State) -> State:
  """One word of every row that neither waits nor has finished."""
  model, options, ids = fixed.model, fixed.options, fixed.model.config.token_ids
  active = ~(state.at_mask | state.finished)
  state, key = _next_key(state)
  token = choose_words(
    model.llm.logits(state.last_hidden), options.text_choice, key
  )
  token = jnp.where(active, token, state.token)
  at_mask = active & fixed.lead(token == ids.ge_start)
  exhausted = at_mask & (state.num_masks >= options.max_masks)
  ended = active & fixed.lead(token == ids.im_end)
  state = state._replace(
    token=token,
    at_mask=state.at_mask | (at_mask & ~exhausted),
    finished=state.finished | ended | exhausted,
  )
  spoken = active & ~at_mask
  state = _say(fixed, state, token, spoken)
  return _feed(fixed, state, token, spoken & ~state.finished)


def mask_step(fixed: Fixed, state: State, *, fed: bool = False) -> State:
  """Predicts a mask; `fed`: `<ge_start>` has been through the decoder."""
  model, options = fixed.model, fixed.options
  b, n = fixed.num_rows, model.scales.num_codes
  state, key = _next_key(state)
  masked = state.at_mask
  side, channels = model.scales.latent_side, model.config.vqvae.latent_channels
  partial = jnp.zeros((b, side, side, channels))
  codes, log_probs, traces = [], [], []
  cache = state.cache
  for k in range(fixed.num_scales):
    hidden = state.last_hidden[:, None] if fed and k == 0 else None
    side = model.scales.sides[k]
    with jax.named_scope(f"scale_{side}x{side}"):
      cache, code, log_prob, seen = _predict_scale(
        fixed, state, cache, partial, k, hidden, key
      )
      if k + 1 < fixed.num_scales:
        partial = model.vqvae.quantizer.add_scale(partial, code, k)
    codes.append(code)
    log_probs.append(log_prob)
    traces.append(seen)
  place = (
    jnp.arange(b),
    jnp.where(masked, state.num_masks, options.max_masks),
  )

  def write(old, parts):
    new = jnp.concatenate(parts, 1)
    rest = [(0, 0), (0, n - new.shape[1])] + [(0, 0)] * (new.ndim - 2)
    return old.at[place].set(jnp.pad(new, rest), mode="drop")

  trace = state.trace
  if trace is not None:
    inputs, hiddens, positions = zip(*traces, strict=True)
    trace = (
      write(trace[0], inputs),
      write(trace[1], hiddens),
      write(trace[2], positions),
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
  end = jnp.full((b,), model.config.token_ids.ge_end, jnp.int32)
  state = _say(fixed, state, end, masked)
  if options.stop_after_masks:
    done = masked & (state.num_masks >= options.max_masks)
    state = state._replace(finished=state.finished | done)
  return _feed(fixed, state, end, masked & ~state.finished)


def _predict_scale(
  fixed: Fixed,
  state: State,
  cache: KVCache,
  partial: Float[Array, "b side side c"],
  k: int,
  hidden: Float[Array, "b count d"] | None,
  key: Key[Array, ""] | None,
) -> tuple[KVCache, Array, Array, tuple[Array, Array, Array]]:
  """Scale k of the masked rows; `hidden` where the decoder has run it.

  Returns:
    cache, codes [b count], their log-probabilities, and what `collect` keeps.
  """
  model, options, scales = fixed.model, fixed.options, fixed.model.scales
  b, masked = fixed.num_rows, state.at_mask
  offset, count = scales.offsets[k], scales.counts[k]
  if k:
    feature = model.vqvae.quantizer.next_input(partial, k - 1)
    x = model.slot_embeddings(feature, offset)
  else:
    x = model.llm.embed(state.token[:, None])
  places = state.next_position[:, None] + jnp.arange(offset, offset + count)
  if hidden is None:
    # What this mask, and the text after it, will still need stays unseen.
    unused = scales.num_codes - offset - count + 1
    unused += (not options.stop_after_masks) * options.max_text
    full = model.config.full_attention_in_scale
    hidden, cache = model.llm.extend(
      x,
      cache,
      positions=places,
      valid=jnp.broadcast_to(masked[:, None], (b, count)),
      reach=jnp.full((b, count), count - 1, jnp.int32) if full else None,
      visible_slots=fixed.slots - unused,
    )
  seen = (x.astype(jnp.float32), hidden.astype(jnp.float32), places)
  if options.guidance is not None:
    rows, ramp = b // 2, options.guidance * k / max(len(scales) - 1, 1)
    wide = hidden.astype(jnp.float32)
    mixed = (1 + ramp) * wide[:rows] - ramp * wide[rows:]
    hidden = mixed.astype(hidden.dtype)  # Rounded once.
  found = scale_prediction(
    hidden,
    model.code_head.astype(hidden.dtype),
    model.vqvae.quantizer.codebook[...],
    key=None if key is None else jax.random.fold_in(key, k),
    temperature=options.code_choice.temperature,
    top_k=options.code_choice.top_k,
  )
  code = fixed.lead(found.codes)
  log_prob = fixed.lead(found.scores.logits - found.scores.log_sum_exp)
  if fixed.given_codes is not None:
    mask = jnp.minimum(state.num_masks, options.max_masks - 1)
    code = fixed.given_codes[jnp.arange(b), mask, offset : offset + count]
  return cache, code, log_prob, seen


def _say(
  fixed: Fixed,
  state: State,
  token: Int[Array, "b"],
  speaking: Bool[Array, "b"],
) -> State:
  """Appends a token to the answers of some rows."""
  max_text = fixed.options.max_text
  at = jnp.where(speaking, state.text_length, max_text)
  rows = jnp.arange(fixed.num_rows)
  written = state.tokens.at[rows, at].set(token, mode="drop")
  length = state.text_length + speaking.astype(jnp.int32)
  full = length >= max_text
  return state._replace(
    tokens=written, text_length=length, finished=state.finished | full
  )


def _feed(
  fixed: Fixed,
  state: State,
  token: Int[Array, "b"],
  fed: Bool[Array, "b"],
) -> State:
  """Runs one token of some rows through the decoder, if there are any."""
  llm, options = fixed.model.llm, fixed.options
  seen = fixed.prompt_slots + options.max_text if options.one_mask else None

  def run(state: State) -> State:
    hidden, cache = llm.extend(
      llm.embed(token[:, None]),
      state.cache,
      positions=state.next_position[:, None],
      valid=fed[:, None],
      visible_slots=seen,
    )
    return state._replace(
      cache=cache,
      last_hidden=jnp.where(fed[:, None], hidden[:, 0], state.last_hidden),
      next_position=state.next_position + fed.astype(jnp.int32),
    )

  return jax.lax.cond(jnp.any(fed), run, lambda s: s, state)


def _next_key(state: State) -> tuple[State, Array | None]:
  if state.key is None:
    return state, None
  left, key = jax.random.split(state.key)
  return state._replace(key=left), key
