"""Programs from images and requests to masks, and the bounds of their time."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from argenseg_jax import construct
from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.generate import (
  Generated,
  generate,
  prefill_prefix,
)
from argenseg_jax.inference.segment import seg_mask_at_size, to_uint8
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import int8
from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
from argenseg_jax.models.int8 import Weights
from argenseg_jax.models.llm import KVCache
from argenseg_jax.tools.bench.stages import AHEAD, PROMPT_TEXT, stages

WHOLE = "image to mask"
VISION = "vision tower"
ONE_PASS = "one token through the decoder"
_SIZE = (480, 640)  # Of the image that a mask is resized to.
_OPTIONS = GenerationOptions(
  max_text=8, start_with_mask=True, stop_after_masks=True
)


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


def model(
  config: ModelConfig, dtype: DTypeLike, weights: Weights | Literal[""] = ""
) -> ARGenSeg:
  """With random weights, ready to generate.

  Args:
    config: of the model.
    dtype: of weights and computation.
    weights: eight-bit ones for the decoder, "" for `dtype`.
  """
  made = ARGenSeg(
    config,
    rngs=construct.Rngs(0),
    dtype=jnp.dtype(dtype),
    param_dtype=jnp.dtype(dtype),
  )
  if weights:
    int8.quantize(made.llm, weights)
  made.prepare_to_generate()
  return made


def of_state(graph: nnx.GraphDef, function: Callable) -> Callable:
  """`function(model, ...)` as a program (state, ...)."""

  def run(state, *xs):
    return function(nnx.merge(graph, state), *xs)

  return run


def codes(
  model: ARGenSeg, tokens: Array, vision: Array, *, collect: bool = False
) -> Generated:
  """Of a mask for each row, scale by scale."""
  return generate(
    model,
    dataclasses.replace(_OPTIONS, collect=collect),
    tokens=tokens,
    valid=jnp.ones_like(tokens, bool),
    vision=vision,
  )


def codes_one_by_one(
  model: ARGenSeg, tokens: Array, vision: Array, inputs: Array
) -> Array:
  """The same codes, one pass each, after the same prefill.

  Args:
    model: as for `codes`.
    tokens: as for `codes`.
    vision: as for `codes`.
    inputs: [b n width], what the decoder reads for each code.
  """
  b, t = tokens.shape
  slots = t + model.config.vqvae.codes_per_mask
  _, cache = model.llm.extend(
    model.prompt_embeddings(tokens, vision),
    KVCache.empty(model.config.llm, b, slots, model.llm.dtype),
    positions=jnp.broadcast_to(jnp.arange(t), (b, t)),
    valid=jnp.ones((b, t), bool),
    visible_slots=t,
  )

  def step(cache, x):
    hidden, cache = model.llm.extend(
      x[:, None],
      cache,
      positions=jnp.full((b, 1), cache.length),
      valid=jnp.ones((b, 1), bool),
    )
    code, *_ = scale_prediction(
      hidden,
      model.code_head.astype(hidden.dtype),
      model.vqvae.quantizer.codebook[...],
    )
    return cache, code[:, 0]

  return jax.lax.scan(step, cache, jnp.moveaxis(inputs, 1, 0))[1]


def vision(model: ARGenSeg, images: Array) -> Array:
  return model.vision_embeddings(normalize_images(images))


def image_to_mask(model: ARGenSeg, tokens: Array, images: Array) -> Array:
  """uint8 mask images, one a row, each of its own image."""
  return _decoded(model, codes(model, tokens, vision(model, images)))


def requests_of_an_image(prefix: int) -> Callable:
  """A program like `image_to_mask` whose rows all ask about the first image,
  and share the first `prefix` tokens."""

  def run(model, tokens, images):
    seen = vision(model, images[:1])
    shared = prefill_prefix(model, tokens[:1, :prefix], seen)
    generated = generate(
      model,
      _OPTIONS,
      tokens=tokens[:, prefix:],
      valid=jnp.ones_like(tokens[:, prefix:], bool),
      vision=None,
      prefix=shared,
    )
    return _decoded(model, generated)

  return run


def _decoded(model: ARGenSeg, generated: Generated) -> Array:
  return to_uint8(model.vqvae.decode(generated.codes[:, 0]))


def with_host(program, state, inputs: Inputs) -> list[np.ndarray]:
  """From images on the host to masks of 480 x 640."""
  images = jax.device_put(inputs.host_images)
  decoded = jax.device_get(program(state, inputs.tokens, images))
  return [seg_mask_at_size(image, _SIZE) for image in decoded]


def one_pass(model: ARGenSeg, tokens: Array) -> Array:
  """One token a row behind a full prompt; the cache is made in the program."""
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
