"""Whole programs, from images and requests to masks, and their times."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.generate import (
  Generated,
  generate,
  prefill_prefix,
)
from argenseg_jax.inference.segment import to_uint8
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.model_config import ModelConfig
from argenseg_jax.models import int8
from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
from argenseg_jax.models.llm import KVCache
from argenseg_jax.tools.bench import stages
from argenseg_jax.tools.bench.stages import Stage
from argenseg_jax.tools.bench.timing import Timed, median_seconds

_OPTIONS = GenerationOptions(
  max_text=8, start_with_mask=True, stop_after_masks=True
)


class Inputs:
  """Random images, and prompts that ask for a mask.

  Attributes:
    tokens: int32 [batch t].
    images: uint8 [batch 1 side side 3].
    prefix: how many tokens all rows may share, the image's the last of them.
  """

  def __init__(self, config: ModelConfig, batch: int, rng: np.random.Generator):
    ids, seen = config.token_ids, config.vision.num_embeddings
    words = seen + stages.PROMPT_TEXT
    prompt = rng.integers(10, 11 + ids.first_code // 4, words)
    self.prefix = stages.AHEAD + seen
    prompt[stages.AHEAD : self.prefix] = ids.img_context
    self.tokens = jnp.asarray(np.tile(prompt, (batch, 1)), jnp.int32)
    side = config.vision.image_side
    images = rng.integers(0, 256, (batch, 1, side, side, 3))
    self.images = jnp.asarray(images, jnp.uint8)


class Timer:
  """Times programs of one model with random weights.

  Args:
    config: of the model.
    dtype: of weights and computation.
    weights: int8 or float8_e4m3fn for the decoder's, "" for `dtype`.
    batch: said in each result.
    repeats: see `timing.median_seconds`.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    dtype: str,
    weights: int8.Weights | Literal[""],
    batch: int,
    repeats: int,
  ):
    def make():
      model = ARGenSeg(
        config,
        rngs=nnx.Rngs(0),
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
      )
      if weights:
        int8.quantize(model.llm, weights)
      model.prepare_to_generate()
      return model

    self._graph = nnx.graphdef(nnx.eval_shape(make))
    self._state = jax.jit(lambda: nnx.state(make()))()
    self._batch, self._repeats = batch, repeats

  def program(
    self,
    name: str,
    function: Callable,
    *inputs: Any,
    bound: float | None = None,
  ) -> tuple[Any, Timed]:
    """Times `function(model, *inputs)`; returns its result too."""
    program = self._compiled(function)

    def run():
      return jax.block_until_ready(program(self._state, *inputs))

    return self._timed(name, run, bound)

  def stage(self, stage: Stage, bound: float) -> Timed:
    """With made-up inputs; a cache goes round and round."""
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stage.inputs)
    if not stage.cached:
      return self.program(stage.name, stage.function, *made, bound=bound)[1]
    program = self._compiled(stage.function, donate_argnums=1)
    cache, *rest = made

    def run():
      nonlocal cache
      out, cache = program(self._state, cache, *rest)
      jax.block_until_ready((out, cache))

    return self._timed(stage.name, run, bound)[1]

  def _compiled(self, function: Callable, **options: Any) -> Callable:
    def run(state, *xs):
      return function(nnx.merge(self._graph, state), *xs)

    return jax.jit(run, **options)

  def _timed(
    self, name: str, run: Callable[[], Any], bound: float | None
  ) -> tuple[Any, Timed]:
    began = time.perf_counter()
    result = run()
    first = time.perf_counter() - began
    seconds = median_seconds(run, self._repeats)
    return result, Timed(name, self._batch, seconds, first - seconds, bound)


def codes(model: ARGenSeg, tokens: Array, vision: Array) -> Generated:
  """Of a mask for each row, scale by scale."""
  return generate(
    model,
    dataclasses.replace(_OPTIONS, collect=True),
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


def image_to_mask(model: ARGenSeg, tokens: Array, images: Array) -> Array:
  """uint8 mask images, one a row, each of its own image."""
  vision = model.vision_embeddings(normalize_images(images))
  return _decoded(model, codes(model, tokens, vision))


def requests_of_an_image(prefix: int) -> Callable:
  """A program like `image_to_mask` whose rows all ask about the first image,
  and share the first `prefix` tokens."""

  def run(model, tokens, images):
    embeddings = model.vision_embeddings(normalize_images(images[:1]))
    shared = prefill_prefix(model, tokens[:1, :prefix], embeddings)
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
