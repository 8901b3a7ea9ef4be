"""The stages of a mask as programs of their own, and what each must cost.

FLOPs and bytes are counted product by product (`argenseg_jax.flops`): weights,
operands and results once each, and the keys and values that attention reads.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from argenseg_jax.inference.segment import to_uint8
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.model_config import LLMConfig, ModelConfig
from argenseg_jax.models import flops
from argenseg_jax.models.argenseg import ARGenSeg, normalize_images
from argenseg_jax.models.flops import Product
from argenseg_jax.models.llm import KVCache

PROMPT_TEXT = 40  # Text tokens around the picture.
AHEAD = 5  # Of them, before the picture.


class Cost(NamedTuple):
  """The least that a stage computes and moves."""

  flops: float
  bytes: float

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Stage(NamedTuple):
  """Part of the way from picture to mask.

  Attributes:
    name: of its row in the table.
    function: of the model and `inputs`; one with a cache returns it as it came,
      last, so that it can be donated and called again.
    inputs: shapes.
    cost: at the batch size of `inputs`.
    cached: whether the first input is a cache.
  """

  name: str
  function: Callable
  inputs: tuple
  cost: Cost
  cached: bool = False


def stages(config: ModelConfig, batch: int, dtype: str) -> Iterator[Stage]:
  """Vision tower, prefill, a word, each scale, VQ decode."""
  size = jnp.dtype(dtype).itemsize
  llm, vqvae = config.llm, config.vqvae
  scales = vqvae.pyramid
  seen = config.vision.num_embeddings
  t = seen + PROMPT_TEXT
  side = config.vision.image_side
  slots = t + 1 + scales.num_codes
  cache = jax.eval_shape(lambda: KVCache.empty(llm, batch, slots, dtype))

  def struct(kind, *shape):
    return jax.ShapeDtypeStruct((batch, *shape), jnp.dtype(kind))

  yield Stage(
    "vision tower",
    lambda model, x: model.vision_embeddings(normalize_images(x)),
    (struct("uint8", 1, side, side, 3),),
    products_cost(flops.vision(config.vision, llm.width, batch), size),
  )
  yield Stage(
    "prefill",
    _prefill,
    (struct("int32", t), struct(dtype, seen, llm.width)),
    extension_cost(llm, batch, t, t / 2, size),
  )
  head = Product("head", batch, llm.width, llm.vocab_size)
  yield Stage(
    "text, a word",
    _word,
    (cache, struct(dtype, llm.width)),
    extension_cost(llm, batch, 1, t, size) + products_cost([head], size),
    cached=True,
  )
  latent = struct(
    "float32", scales.latent_side, scales.latent_side, vqvae.latent_channels
  )
  for k, (n, offset) in enumerate(
    zip(scales.counts, scales.offsets, strict=True)
  ):
    head = Product("head", batch * n, llm.width, vqvae.num_codes)
    before = scales.counts[max(k - 1, 0)]
    # Causal: half of a scale's own keys.
    cost = extension_cost(llm, batch, n, t + 1 + offset + n / 2, size)
    yield Stage(
      f"scale {vqvae.scales[k]} x {vqvae.scales[k]}",
      _scale(k, t + offset, slots - scales.num_codes + offset + n),
      (cache, latent, struct("int32", before)),
      cost + products_cost([head], size),
      cached=True,
    )
  whole = list(flops.image_tokenizer(vqvae, batch, decode=True))
  encoder = len(list(flops.image_tokenizer(vqvae, batch, decode=False)))
  yield Stage(
    "VQ decode",
    lambda model, codes: to_uint8(model.vqvae.decode(codes)),
    (struct("int32", scales.num_codes),),
    products_cost(whole[encoder:], size),
  )


def products_cost(products: Iterable[Product], size: int) -> Cost:
  """Of a forward pass in a dtype of `size` bytes."""
  total = Cost(0.0, 0.0)
  for p in products:
    layers = p.count if p.makes else 1
    moved = (p.m * p.k + p.m * p.n) * p.count
    # Scores of attention stay on the chip.
    moved = moved + p.k * p.n * layers if p.weights else p.m * p.k * p.count
    total += Cost(p.flops, size * moved)
  return total


def extension_cost(
  llm: LLMConfig, rows: int, t: int, seen: float, size: int
) -> Cost:
  """Of `t` more positions that see `seen` keys on average."""
  d, hd, m = llm.width, llm.head_dim, rows * t
  heads = llm.num_heads + 2 * llm.num_kv_heads
  again = {"count": llm.num_layers, "makes": "nothing"}
  cost = products_cost(
    [
      Product("llm", m, d, heads * hd, **again),
      Product("llm", m, llm.num_heads * hd, d, **again),
      Product("llm", m, d, 2 * llm.mlp_width, **again),
      Product("llm", m, llm.mlp_width, d, **again),
    ],
    size,
  )
  scores = 4 * m * seen * llm.num_heads * hd * llm.num_layers
  kept = 2 * rows * seen * llm.num_kv_heads * hd * llm.num_layers
  return cost + Cost(scores, size * kept)


def _prefill(model: ARGenSeg, tokens, vision):
  rows, length = tokens.shape
  hidden, _ = model.llm.extend(
    model.prompt_embeddings(tokens, vision),
    KVCache.empty(model.config.llm, rows, length, model.llm.dtype),
    positions=jnp.broadcast_to(jnp.arange(length), tokens.shape),
    valid=jnp.ones_like(tokens, bool),
  )
  return hidden


def _extend(model: ARGenSeg, x, cache: KVCache, start: int, visible: int):
  """Runs positions from `start` on; the cache is full up to there."""
  b, t = x.shape[:2]
  filled = jnp.arange(cache.valid.shape[1]) < start
  cache = cache._replace(
    length=jnp.full((), start, jnp.int32),
    valid=jnp.broadcast_to(filled, cache.valid.shape),
  )
  return model.llm.extend(
    x,
    cache,
    positions=jnp.broadcast_to(jnp.arange(start, start + t), (b, t)),
    valid=jnp.ones((b, t), bool),
    visible_slots=visible,
  )


def _word(model: ARGenSeg, cache: KVCache, hidden):
  t = model.config.vision.num_embeddings + PROMPT_TEXT
  logits = jnp.einsum(
    "bd,vd->bv",
    hidden,
    model.llm.head.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  token = jnp.argmax(logits, -1)
  x = model.llm.embed(token[:, None])
  hidden, cache = _extend(model, x, cache, t, t + 1)
  return hidden, cache


def _scale(k: int, start: int, visible: int) -> Callable:
  def run(model: ARGenSeg, cache: KVCache, partial, codes_before):
    quantizer = model.vqvae.quantizer
    if k:
      partial = quantizer.add_scale(partial, codes_before, k - 1)
      feature = quantizer.next_input(partial, k - 1)
      x = model.slot_embeddings(feature, model.scales.offsets[k])
    else:
      ids = model.config.token_ids
      x = model.llm.embed(jnp.full((len(partial), 1), ids.ge_start))
    hidden, cache = _extend(model, x, cache, start, visible)
    codes, *_ = scale_prediction(
      hidden,
      model.code_head.astype(hidden.dtype),
      quantizer.codebook[...],
    )
    return (codes, partial), cache

  return run
