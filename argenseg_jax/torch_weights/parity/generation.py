"""Parity of generation: answers, codes, guidance, pictures."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax.inference import generate
from argenseg_jax.inference.segment import to_uint8
from argenseg_jax.torch_weights.parity.compare import Check, Golden


def checks(golden: Golden, case: str, graph, state, decode) -> dict[str, Check]:
  """Checks of one prompt, or of a pair of them under guidance.

  Args:
    golden: the folder.
    case: name of the prompt.
    graph: of the model.
    state: of the model.
    decode: codes [n] -> partial latents and pictures after each scale.
  """
  model = nnx.merge(graph, state)
  config = model.config
  tokens = golden[f"in.{case}.input_ids"]
  pixels = np.moveaxis(golden[f"in.{case}.pixel_values"], 1, -1)
  answer = golden[f"out.{case}.output_ids"]
  guided = len(tokens) > 1
  guidance = float(golden.config.get("cfg", 4.0)) if guided else None
  # An answer that was not cut short must also end by itself here.
  ended = answer[0, -1] == config.token_ids.im_end
  max_text = answer.shape[1] + (2 if ended else 0)
  max_masks = int(golden[f"out.{case}.num_masks"][0]) + 1

  pattern = re.compile(rf"out\.{case}\.mask(\d+)\.idx")
  masks = sorted(
    int(m[1]) for m in map(pattern.fullmatch, golden.recorded) if m
  )
  recorded = np.zeros(
    (len(tokens), max_masks, model.scales.num_codes), np.int32
  )
  for mask in masks:
    recorded[:, mask] = golden[f"out.{case}.mask{mask}.idx"]

  @functools.partial(jax.jit, static_argnums=1)
  def run(state, free):
    model = nnx.merge(graph, state)
    out = generate.generate(
      model,
      tokens=jnp.asarray(tokens, jnp.int32),
      valid=jnp.asarray(golden[f"in.{case}.attention_mask"] > 0),
      vision=model.vision_embeddings(jnp.asarray(pixels)[:, None]),
      max_text=max_text,
      max_masks=max_masks,
      guidance=guidance,
      collect=True,
      given_codes=None if free else jnp.asarray(recorded),
    )
    raw = jnp.einsum("bmnd,vd->bmnv", out.hidden, model.code_head)
    return out, raw

  @functools.cache
  def free_running():
    return run(state, True)

  @functools.cache
  def agrees():
    """Whether all codes came out as recorded, without help."""
    return np.array_equal(free_running()[0].codes[:, masks], recorded[:, masks])

  @functools.cache
  def generated():
    """Where a toss-up went the other way, all else follows the recorded codes:
    each choice is then judged given the recorded ones before it."""
    return free_running() if agrees() else run(state, False)

  @functools.cache
  def pictures(mask):
    """Partial latents and clamped pictures after each scale."""
    return decode(generated()[0].codes[0, mask])

  def output_ids():
    """As `generate` of the authors returns them: cut after the last token."""
    found = np.asarray(generated()[0].tokens)
    length = max(np.max(np.sum(found != 0, 1)), answer.shape[1])
    found = found[:, :length]
    # Both rows of a guided pair are given the conditional row's tokens.
    return np.broadcast_to(found[:1], found.shape) if guided else found

  def raw(mask):
    return generated()[1][:, mask]

  def guided_logits(mask):
    if not guided:
      return raw(mask)
    level = model.scales.scale_of_code
    ramp = guidance * level / max(len(model.scales) - 1, 1)
    ramp = jnp.asarray(ramp, jnp.float32)[None, :, None]
    return (1 + ramp) * raw(mask)[:1] - ramp * raw(mask)[1:]

  def choices(mask):
    if agrees():
      return generated()[0].codes[:1, mask]
    return jnp.argmax(guided_logits(mask), -1)

  def margin(mask):
    top = jax.lax.top_k(guided_logits(mask), 2)[0]
    return top[..., 0] - top[..., 1]

  def recorded_margin(mask):
    name = f"out.{case}.mask{mask}.margin"
    return golden[name] if name in golden else margin(mask)

  def latents(mask):
    """[scales 1 c h w]."""
    return jnp.moveaxis(pictures(mask)[0], -1, 1)[:, None]

  def image(mask):
    return jnp.moveaxis(pictures(mask)[1][-1:], -1, 1)

  def pixels_of(decoded):
    return to_uint8(jnp.asarray(decoded))

  def arrays(mask):
    def inputs():
      return generated()[0].inputs[:, mask]

    return {
      "idx": Check(
        lambda: choices(mask),
        margin=lambda: recorded_margin(mask),
      ),
      "position_ids": Check(lambda: generated()[0].positions[:, mask]),
      "first_input": Check(lambda: inputs()[:, :1]),
      "margin": Check(lambda: margin(mask)),
      "f_hat": Check(lambda: latents(mask)),
      "f_hat_final": Check(lambda: latents(mask)[-1]),
      "llm_inputs": Check(inputs),
      "raw_visual_logits": Check(lambda: raw(mask)),
      "raw_logits": Check(lambda: raw(mask)),
      "guided_logits": Check(lambda: guided_logits(mask)),
      "image_float": Check(lambda: image(mask)),
      "image_uint8": Check(lambda: pixels_of(pictures(mask)[1][-1])),
      "multi_uint8": Check(lambda: pixels_of(pictures(mask)[1])),
    }

  found = {
    f"out.{case}.output_ids": Check(output_ids),
    f"out.{case}.num_masks": Check(lambda: generated()[0].num_masks[:1]),
  }
  for mask in masks:
    prefix = f"out.{case}.mask{mask}."
    found |= {prefix + name: check for name, check in arrays(mask).items()}
  return found
