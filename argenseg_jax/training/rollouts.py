"""Answers that a model samples to the requests of a batch, and their rewards.

For each request the prompt is taken from its row, left-padded and asked
`group_size` times in the program that predicts and evaluates
(`inference/generate`); its masks are decoded and judged on the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from argenseg_jax.config import ConfigError, RLConfig, RunConfig
from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.generate import Generated, generate
from argenseg_jax.inference.sampler import Choice
from argenseg_jax.inference.segment import to_uint8
from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
from argenseg_jax.training import rewards
from argenseg_jax.types import CODE_TARGET, MASK_THRESHOLD, Batch

_TINY = 1e-4  # Added to deviations: groups that hardly differ stay small.


class LogProbs(NamedTuple):
  """Log-probabilities of sampled answers, at the sampling temperatures."""

  text: Array  # float32 [b g text]; 0 after an answer's end.
  codes: Array  # float32 [b g n]; 0 where there is no mask.


class Rollout(NamedTuple):
  """Sampled answers to the requests of a batch, g to each; b rows first."""

  lead: Array  # int32 [b t]: left-padded, what each answer follows.
  lead_valid: Array  # bool [b t]
  is_answer: Array  # bool [b t]: words of the answer that were given.
  weight: Array  # float32 [b]; 0 for requests that could not be asked.
  tokens: Array  # int32 [b g text], see `generate.Generated`.
  text_length: Array  # int32 [b g]; `<ge_start>` or the end included.
  has_mask: Array  # bool [b g]
  codes: Array  # int32 [b g n]
  rewards: Array  # float32 [b g k], one for each function, without its weight.
  advantages: Array  # float32 [b g]
  # Under the weights that sampled; None: those that are being updated.
  old: LogProbs | None = None
  start: LogProbs | None = None  # Under those that training started from.


class Lead(NamedTuple):
  """What answers follow, and what is right."""

  tokens: Array  # int32 [b t], left-padded.
  valid: Array  # bool [b t]
  is_answer: Array  # bool [b t]
  is_due: Array  # bool [b]: a mask is to be drawn.
  weight: Array  # float32 [b]


def text_slots(config: RunConfig) -> int:
  """Positions of sampled text in an answer."""
  return 0 if config.rl.given_text else config.eval.max_text


def leads(batch: Batch, config: RunConfig, model: ARGenSeg) -> Lead:
  """The prompt of each row, with its answer's text where that is given.

  With text and codes it fills `data.sequence_length`. Rows get weight 0 whose
  prompt is longer, whose mask belongs to a later answer, or which have no mask
  while only codes are sampled.

  Raises:
    ConfigError: no prompt fits.
  """
  ids, n = model.config.token_ids, model.scales.num_codes
  length = config.data.sequence_length - (n - 1) - text_slots(config)
  if length < 1:
    raise ConfigError(
      f"config key 'data.sequence_length' is {config.data.sequence_length}, "
      f"which {n} codes and 'eval.max_text' of {config.eval.max_text} leave no "
      "room in for a prompt."
    )
  first = batch.segment_ids == 1
  prompt = jnp.sum(batch.is_prompt & first, 1)
  # Of the first answer.
  over = jnp.cumsum(first & (batch.targets == ids.im_end), 1) > 0
  due = first & ~over & (batch.targets == CODE_TARGET)
  is_due = jnp.any(due, 1)
  asked = is_due | ~jnp.any(batch.mask_valid, 1)
  used = prompt
  if config.rl.given_text:
    used = jnp.argmax(due, 1) + 1  # Up to and including `<ge_start>`.
    asked = is_due
  place = jnp.arange(length)[None] - (length - used)[:, None]
  valid = place >= 0
  place = jnp.clip(place, 0, batch.tokens.shape[1] - 1)
  tokens = jnp.take_along_axis(batch.tokens, place, axis=1)
  asked = asked & (used <= length) & (prompt > 0)
  return Lead(
    tokens=jnp.where(valid, tokens, 0).astype(jnp.int32),
    valid=valid,
    is_answer=valid & (place >= prompt[:, None]),
    is_due=is_due,
    weight=batch.sample_weight * asked,
  )


@jax.named_scope("rollout")
def sample(
  model: ARGenSeg, batch: Batch, config: RunConfig, key: Array
) -> Rollout:
  """Answers to every request of a batch, with rewards and advantages.

  Args:
    model: the whole model; it is prepared for generation.
    batch: requests with their true masks.
    config: of the run.
    key: of the step.
  """
  lead = leads(batch, config, model)
  answers = answer(model, batch, lead, config, key)
  return judged(model, batch, lead, config, answers)


def judged(
  model: ARGenSeg,
  batch: Batch,
  lead: Lead,
  config: RunConfig,
  answers: Generated,
) -> Rollout:
  """Answers to `lead`, from `answer`, beside their rewards."""
  rl, b, g = config.rl, batch.tokens.shape[0], config.rl.group_size

  def grouped(x: Array) -> Array:
    return x.reshape(b, g, *x.shape[1:])

  codes, has_mask = grouped(answers.codes[:, 0]), grouped(answers.num_masks > 0)
  tokens, length = grouped(answers.tokens), grouped(answers.text_length)
  seg_masks = jax.lax.map(
    lambda codes: binary_masks(to_uint8(model.vqvae.decode(codes))),
    jnp.swapaxes(codes, 0, 1),  # One answer to each request at a time.
  )
  seg_masks = jnp.swapaxes(seg_masks, 0, 1) & has_mask[..., None, None]
  truths = binary_masks(batch.seg_masks[:, 0]) & lead.is_due[:, None, None]
  last = jnp.take_along_axis(tokens, length[..., None] - 1, axis=2)[..., 0]
  ended = has_mask | (last == model.config.token_ids.im_end)

  def flat(x: Array) -> Array:
    return x.reshape(b * g, *x.shape[2:])

  answered = rewards.Answered(
    seg_masks=flat(seg_masks),
    truths=jnp.repeat(truths, g, axis=0),
    has_mask=flat(has_mask),
    is_due=jnp.repeat(lead.is_due, g),
    ended=flat(ended),
    tokens=flat(tokens),
  )
  functions, weights = zip(*rewards.chosen(rl).values(), strict=True)
  found = [f(answered).astype(jnp.float32) for f in functions]
  total = sum(w * x for w, x in zip(weights, found, strict=True))
  slots = text_slots(config)
  return Rollout(
    lead=lead.tokens,
    lead_valid=lead.valid,
    is_answer=lead.is_answer,
    weight=lead.weight,
    tokens=tokens[..., :slots],
    text_length=jnp.minimum(length, slots),
    has_mask=has_mask,
    codes=codes,
    rewards=grouped(jnp.stack(found, -1)),
    advantages=advantages(grouped(jnp.asarray(total)), rl),
  )


def advantages(
  rewards: Float[Array, "b g"], config: RLConfig
) -> Float[Array, "b g"]:
  """How much better an answer is than its group; exactly 0 where a group is
  equal."""
  # Means of equal numbers are rounded, differences of equal ones are not.
  rewards = rewards - rewards[:, :1]
  centered = rewards - jnp.mean(rewards, 1, keepdims=True)
  if not config.normalize:
    return centered
  return centered / (jnp.std(rewards, 1, keepdims=True) + _TINY)


def binary_masks(images: UInt8[Array, "r h w c"]) -> Bool[Array, "r h w"]:
  """Which pixels are the object, as `transforms.binary_mask` has it."""
  gray = images[..., 0].astype(jnp.int32)
  if images.shape[-1] == 3:  # Pillow's: integers, rounded.
    shares = jnp.asarray([19595, 38470, 7471], jnp.int32)
    gray = (jnp.sum(images.astype(jnp.int32) * shares, -1) + 0x8000) >> 16
  return gray > int(MASK_THRESHOLD * 255)


def answer(
  model: ARGenSeg, batch: Batch, lead: Lead, config: RunConfig, key: Array
) -> Generated:
  """`group_size` answers to each lead, one after the other.

  The model is prepared for generation.
  """
  rl = config.rl
  model.prepare_to_generate()
  vision = None
  if batch.images.shape[1]:
    vision = model.vision_embeddings(normalize_images(batch.images))
  tokens, valid, is_answer, vision = jax.tree.map(
    lambda x: jnp.repeat(x, rl.group_size, axis=0),
    (lead.tokens, lead.valid, lead.is_answer, vision),
  )
  if rl.given_text:  # Prompts end with `<ge_start>`, which generate says.
    tokens, valid, is_answer = (x[:, :-1] for x in (tokens, valid, is_answer))
  return generate(
    model,
    GenerationOptions(
      max_text=1 if rl.given_text else config.eval.max_text,
      start_with_mask=rl.given_text,
      stop_after_masks=True,
      text_choice=Choice(rl.text_temperature, rl.text_top_k or None),
      code_choice=Choice(rl.code_temperature, rl.code_top_k or None),
    ),
    tokens=tokens,
    valid=valid,
    vision=vision,
    is_answer=is_answer,
    key=key,
  )
