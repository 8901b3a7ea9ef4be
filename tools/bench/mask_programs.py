"""Programs of a mask that `argenseg bench device` times, and their bounds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.generate import generate
from argenseg_jax.inference.segment import seg_mask_at_size, to_uint8
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models.argenseg import normalize_images
from argenseg_jax.models.llm import KVCache
from argenseg_jax.tools.bench.stages import AHEAD, PROMPT_TEXT, stages

WHOLE = "image to mask"
VISION = "vision tower"
ONE_PASS = "one token through the decoder"
_SIZE = (480, 640)  # Of the image that a mask is resized to.


class Inputs(NamedTuple):
  tokens: jax.Array
  images: jax.Array
  host_images: np.ndarray


def inputs(config: ModelConfig, batch: int) -> Inputs:
  """Random prompts with one image each."""
  rng = np.random.default_rng(0)
  ids, seen = config.token_ids, config.vision.num_embeddings
  prompt = rng.integers(10, 11 + ids.first_code // 4, seen + PROMPT_TEXT)
  prompt[AHEAD : AHEAD + seen] = ids.img_context
  side = config.vision.image_side
  images = rng.integers(0, 256, (batch, 1, side, side, 3)).astype(np.uint8)
  tokens = jnp.asarray(np.tile(prompt, (batch, 1)), jnp.int32)
  return Inputs(tokens, jnp.asarray(images), images)


def _codes(model, tokens, vision):
  return generate(
    model,
    GenerationOptions(
      max_text=8,
      start_with_mask=True,
      stop_after_masks=True,
    ),
    tokens=tokens,
    valid=jnp.ones_like(tokens, bool),
    vision=vision,
  ).codes


def vision(graph, state, images):
  return nnx.merge(graph, state).vision_embeddings(normalize_images(images))


def image_to_mask(graph, state, tokens, images):
  """uint8 [b side side 3]."""
  model = nnx.merge(graph, state)
  embeddings = model.vision_embeddings(normalize_images(images))
  codes = _codes(model, tokens, embeddings)
  return to_uint8(model.vqvae.decode(codes[:, 0]))


def with_host(program, state, inputs: Inputs) -> list[np.ndarray]:
  """From images on the host to masks of 480 x 640."""
  images = jax.device_put(inputs.host_images)
  decoded = jax.device_get(program(state, inputs.tokens, images))
  return [seg_mask_at_size(image, _SIZE) for image in decoded]


def one_pass(graph, state, tokens):
  """One token a row behind a full prompt; the cache is made in the program."""
  model = nnx.merge(graph, state)
  b = len(tokens)
  start = model.config.vision.num_embeddings + PROMPT_TEXT
  slots = start + 1 + model.scales.num_codes
  cache = KVCache.empty(model.config.llm, b, slots, model.llm.dtype)
  cache = cache._replace(length=jnp.int32(start))
  hidden, _ = model.llm.extend(
    model.llm.embed(tokens),
    cache,
    positions=jnp.full((b, 1), start),
    valid=jnp.ones((b, 1), bool),
    visible_slots=start + 1,
  )
  return hidden


def token_inputs(config: ModelConfig, batch: int) -> jax.Array:
  return jnp.full((batch, 1), config.token_ids.first_code, jnp.int32)


def bounds(
  config: ModelConfig, batch: int, decoder_bytes: int
) -> dict[str, list[tuple[float, float]]]:
  """FLOPs and bytes of each program's stages, which run one after the other.

  Args:
    decoder_bytes: of the layers' weights as they are kept: each pass reads them
      once, whatever their dtype.
  """
  parts = {s.name: s.cost for s in stages(config, batch, "bfloat16")}
  decoder = [
    (cost.flops, decoder_bytes)
    for name, cost in parts.items()
    if name == "prefill" or name.startswith("scale ")
  ]
  tower, decode = (
    (cost.flops, cost.bytes)
    for cost in (parts["vision tower"], parts["VQ decode"])
  )
  return {
    WHOLE: [tower, *decoder, decode],
    VISION: [tower],
    ONE_PASS: [(parts["text, a word"].flops, decoder_bytes)],
  }
