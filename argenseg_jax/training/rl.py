"""Group-relative policy optimization on masks (arXiv 2402.03300).

An answer's advantage is its reward less the mean of its group. The gradient
raises the probability of every word and code of the better answers; ratios to
the weights that sampled are clipped, and a nat away from the start costs
`rl.kl`, by the estimate exp(d) - d - 1 with d = log(start / current).
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from argenseg_jax.config import (
  ConfigError,
  DataConfig,
  RLConfig,
  RunConfig,
)
from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import flops
from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
from argenseg_jax.models.remat import POLICIES
from argenseg_jax.training import rewards, rollouts
from argenseg_jax.training.rollouts import LogProbs, Rollout
from argenseg_jax.types import Batch

SAMPLING = "rollout"  # Part of products that only sample.


def check(config: RunConfig) -> None:
  """Raises ConfigError for settings that do not suit the task."""
  data, rl = config.data, config.rl
  for key, value in (("pack", 1), ("max_masks", 1), ("mask_channels", 1)):
    if getattr(data, key) != value:
      raise ConfigError(
        f"config key 'data.{key}' is {getattr(data, key)}; task 'rl' samples "
        f"one mask for each row, so set it to {value}."
      )
  if rl.code_temperature == 0 and (rl.given_text or rl.text_temperature == 0):
    raise ConfigError(
      "config keys 'rl.text_temperature' and 'rl.code_temperature' leave "
      "nothing to chance: all answers of a group would be equal."
    )
  rewards.chosen(rl)


def shared(
  model: ARGenSeg, batch: Batch, config: RunConfig, key: Array
) -> tuple[Rollout, Float[Array, ""]]:
  """Sampled answers to a batch, and what they weigh in all
  (`tasks.Task.shared`)."""
  rollout = rollouts.sample(model, batch, config, key)
  return rollout, jnp.sum(rollout.weight) * config.rl.group_size


def log_probs(
  model: ARGenSeg, batch: Batch, config: RunConfig, rollout: Rollout
) -> LogProbs:
  """Log-probabilities of sampled answers, teacher forced.

  Words are of all words and codes, codes are of all codes, as generation draws
  them; `text_top_k` and `code_top_k` are not seen here.

  Args:
    model: whose probabilities.
    batch: whose images.
    config: of the run.
    rollout: of this batch, or part of one.
  """
  b, g, n = rollout.codes.shape
  hidden, starts = _hidden(model, batch, config, rollout)
  words = rollout.tokens.shape[2]
  lead = rollout.lead.shape[1]
  targets, drawn = _words(model, rollout)
  text = _scored(
    hidden[:, lead - 1 : lead - 1 + words],
    model.llm.head,
    targets.reshape(b * g, words),
    drawn.reshape(b * g, words),
    config,
    config.rl.text_temperature,
  )
  place = starts[:, None] + jnp.arange(n)
  codes = _scored(
    jnp.take_along_axis(hidden, place[..., None], axis=1),
    model.code_head,
    rollout.codes.reshape(b * g, n),
    jnp.broadcast_to(rollout.has_mask.reshape(b * g, 1), (b * g, n)),
    config,
    config.rl.code_temperature,
  )
  return LogProbs(text.reshape(b, g, words), codes.reshape(b, g, n))


def _scored(hidden, head, targets, drawn, config, temperature) -> Array:
  """log softmax(hidden @ head.T / temperature) of the targets that were drawn,
  0 elsewhere; no logits in memory."""
  if not targets.size:
    return jnp.zeros(targets.shape)
  chosen = config.loss.implementation
  hidden = hidden / (temperature or 1.0)
  losses = linear_cross_entropy(
    hidden.reshape(-1, hidden.shape[-1]),
    head.astype(hidden.dtype),
    targets.reshape(-1),
    drawn.reshape(-1).astype(jnp.float32),
    implementation=None if chosen == "auto" else chosen,
  )
  return -losses.reshape(targets.shape)


def _words(
  model: ARGenSeg, rollout: Rollout
) -> tuple[Int[Array, "b g text"], Array]:
  """What was said at each place of text, and whether it was drawn: where a mask
  follows, `<ge_start>`."""
  length = rollout.text_length[..., None]
  place = jnp.arange(rollout.tokens.shape[2])
  is_start = rollout.has_mask[..., None] & (place == length - 1)
  said = jnp.where(is_start, model.config.token_ids.ge_start, rollout.tokens)
  return said, place < length


def _hidden(
  model: ARGenSeg, batch: Batch, config: RunConfig, rollout: Rollout
) -> tuple[Float[Array, "r t d"], Int[Array, "r"]]:
  """Hidden states of leads and answers, r = b g rows, and where in them the
  first code is predicted from."""
  ids, n = model.config.token_ids, model.scales.num_codes
  b, g, words = rollout.tokens.shape
  remat = POLICIES[config.rl.train.remat].policy

  def repeat(x: Array) -> Array:
    return jnp.repeat(x, g, axis=0)

  lead = rollout.lead.shape[1]
  x = model.llm.embed(rollout.lead)
  if batch.images.shape[1]:
    vision = model.vision_embeddings(
      normalize_images(batch.images), remat_policy=remat
    )
    x = model.prompt_embeddings(rollout.lead, vision)
  said, _ = _words(model, rollout)
  said = jnp.pad(said.reshape(b * g, words), ((0, 0), (0, n - 1)))
  place = jnp.arange(words + n - 1)[None]
  length = rollout.text_length.reshape(b * g, 1)
  has_mask = rollout.has_mask.reshape(b * g, 1)
  is_slot = has_mask & (place >= length) & (place < length + n - 1)
  codes = rollout.codes.reshape(b * g, n)
  inputs = model.vqvae.quantizer.scale_inputs(codes)
  inputs = jax.lax.stop_gradient(inputs)[:, None]
  # A placeholder that a model says is a word like any other.
  marks = jnp.where(is_slot, ids.mask_context, 0)
  answer = model.with_slots(model.llm.embed(said), marks, inputs)
  lead_marks = jnp.where(rollout.lead == ids.mask_context, 0, rollout.lead)
  tokens = jnp.concatenate((repeat(lead_marks), marks), 1)
  valid = jnp.concatenate(
    (repeat(rollout.lead_valid), (place < length) | is_slot), 1
  )
  is_prompt = jnp.concatenate(
    (repeat(~rollout.is_answer), jnp.zeros_like(is_slot)), 1
  )
  hidden, _ = model.llm(
    jnp.concatenate((repeat(x), answer.astype(x.dtype)), 1),
    positions=jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0),
    segment_ids=valid.astype(jnp.int32),
    reach=model.reach(tokens, is_prompt),
    rope_length=0,
    remat_policy=remat,
  )
  return hidden, lead - 1 + length[:, 0]


@jax.named_scope("loss")
def part(
  model: ARGenSeg,
  batch: Batch,
  config: RunConfig,
  *,
  noise: Rollout,
  counts: Float[Array, ""],
  warm: bool,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """A part's share of the loss (`tasks.Task.loss`)."""
  del warm
  rl = config.rl
  new = log_probs(model, batch, config, noise)
  old = jax.lax.stop_gradient(new) if noise.old is None else noise.old
  weight = noise.weight[:, None, None]
  gain, clipped = jnp.zeros(()), jnp.zeros(())
  kinds = zip(new, old, _token_weights(model, rl), strict=True)
  for current, before, importance in kinds:
    value, beyond = surrogate(
      current - before, noise.advantages[..., None], rl.clip
    )
    gain += jnp.sum(weight * importance * value)
    clipped += jnp.sum(weight * (importance > 0) * beyond)
  kl = jnp.zeros(())
  if noise.start is not None:
    for current, first in zip(new, noise.start, strict=True):
      kl += jnp.sum(weight * divergence(first - current))
  total = jnp.maximum(counts, 1.0)
  _, drawn = _words(model, noise)
  loss = (rl.kl * kl - gain) / total
  each = noise.weight[:, None]
  sums = {
    "count": jnp.sum(each * jnp.ones_like(noise.advantages)),
    "requests": jnp.sum(noise.weight),
    "left_out": jnp.sum(
      (batch.sample_weight > 0) & (noise.weight == 0), dtype=jnp.float32
    ),
    "kl": kl,
    "clipped": clipped,
    "drawn": jnp.sum(each * (jnp.sum(drawn, -1) + _codes(noise))),
    "text": jnp.sum(each * noise.text_length),
    "masks": jnp.sum(each * noise.has_mask),
    "differing": jnp.sum(noise.weight * jnp.any(noise.advantages != 0, 1)),
    "rewards": jnp.sum(weight * noise.rewards, (0, 1)),
    "best": jnp.sum(noise.weight * jnp.max(_worth(noise, rl), 1)),
  }
  return loss, sums


def _codes(rollout: Rollout) -> Array:
  return rollout.has_mask * rollout.codes.shape[-1]


def _worth(rollout: Rollout, config: RLConfig) -> Float[Array, "b g"]:
  """The weighted sum of an answer's rewards."""
  weights = [weight for _, weight in rewards.chosen(config).values()]
  return rollout.rewards @ jnp.asarray(weights)


def surrogate(
  log_ratio: Float[Array, "*t"], advantage: Float[Array, "*#t"], clip: float
) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
  """What is maximized, and where clipping has taken the gradient away.

  Its gradient at ratio 1 is the advantage times that of the log-probability.
  """
  ratio = jnp.exp(log_ratio)
  bounded = jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
  free = ratio * advantage
  return jnp.minimum(free, bounded), (bounded < free).astype(jnp.float32)


def divergence(log_ratio: Float[Array, "*t"]) -> Float[Array, "*t"]:
  """Estimate of KL(current || start), never negative, in nats.

  Args:
    log_ratio: log(start / current) of what the current model has drawn.
  """
  return jnp.exp(log_ratio) - log_ratio - 1


def _token_weights(
  model: ARGenSeg, config: RLConfig
) -> tuple[float, Float[Array, "n"]]:
  """Of words and of codes in the gradient; what is not drawn has none.

  Raises:
    ConfigError: not one weight for each scale.
  """
  scales, weights = model.scales, config.scale_weights
  if weights and len(weights) != len(scales):
    raise ConfigError(
      f"config key 'rl.scale_weights' holds {len(weights)} numbers; the model "
      f"has {len(scales)} scales."
    )
  by_scale = jnp.asarray(weights or (1.0,) * len(scales), jnp.float32)
  codes = by_scale[jnp.asarray(scales.scale_of_code)]
  text = config.text_weight * (config.text_temperature > 0)
  return text, codes * (config.code_temperature > 0)


def metrics(
  sums: dict[str, Array],
  usage: Int[Array, "codes"],
  config: RunConfig,
  *,
  warm: bool,
) -> tuple[dict[str, Array], Int[Array, "codes"]]:
  """What a step logs (`tasks.Task.metrics`).

  "loss" is what training lowers: `rl.kl` times the divergence, less the reward.
  """
  del warm
  count = jnp.maximum(sums["count"], 1.0)
  requests = jnp.maximum(sums["requests"], 1.0)
  functions = rewards.chosen(config.rl)
  each = dict(zip(functions, sums["rewards"] / count, strict=True))
  weighted = [each[name] * weight for name, (_, weight) in functions.items()]
  reward, kl = jnp.sum(jnp.stack(weighted)), sums["kl"] / count
  found = {
    "loss": config.rl.kl * kl - reward,
    "reward": reward,
    "best_of_group": sums["best"] / requests,
    "kl": kl,
    "clipped": sums["clipped"] / jnp.maximum(sums["drawn"], 1.0),
    "masks": sums["masks"] / count,
    "text_tokens": sums["text"] / count,
    "differing_groups": sums["differing"] / requests,
    "left_out": sums["left_out"],
  }
  if len(each) > 1:
    found |= {f"reward_{name}": value for name, value in each.items()}
  return found, usage


def data(settings: DataConfig) -> DataConfig:
  """Rows with their masks, which rewards compare, from the whole split."""
  return dataclasses.replace(
    settings, cache_codes=False, codes="", warmup_split="", warmup_steps=0
  )


def products(
  model: ModelConfig, settings: DataConfig, config: RunConfig
) -> Iterable[flops.Product]:
  """Matrix products of one request: sampled, scored, and in the updates."""
  rl, scored = config.rl, (config.rl.updates > 1) + config.rl.keeps_start
  vision = [*flops.vision(model.vision, model.llm.width, settings.max_images)]
  embed = flops.Product(
    "word_embed",
    rl.group_size * (model.vqvae.codes_per_mask - 1),
    model.vqvae.latent_channels,
    model.llm.width,
  )
  forward = [*vision, embed, *_decoder(model, settings, config)]
  encoder, whole = (
    [*flops.image_tokenizer(model.vqvae, rl.group_size, decode=decode)]
    for decode in (False, True)
  )
  passes = [(p, 1 + scored) for p in forward]
  for product, times in passes + [(p, 1) for p in whole[len(encoder) :]]:
    yield product._replace(part=SAMPLING, count=product.count * times, makes="")
  for product in forward:
    yield product._replace(count=product.count * rl.updates)


def _decoder(
  model: ModelConfig, settings: DataConfig, config: RunConfig
) -> Iterable[flops.Product]:
  """The language model over a group, with the heads of its words and codes."""
  words = rollouts.text_slots(config)
  heads = ((words, model.llm.vocab_size),) if words else ()
  heads += ((model.vqvae.codes_per_mask, model.vqvae.num_codes),)
  for product in flops.decoder(model.llm, settings.sequence_length):
    parts = [product]
    if product.part == "llm.head":
      parts = [product._replace(m=m, n=n) for m, n in heads]
    for part in parts:
      yield part._replace(count=part.count * config.rl.group_size)
