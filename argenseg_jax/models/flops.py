"""Analytic FLOPs of a step, product by product.

One multiply-add counts as two. A product whose weights train costs three times
its forward pass (output, gradient of the input, gradient of the weights); one
that only passes gradients on costs two; a frozen one costs one. Recomputation
is no model FLOP: it is counted apart. Left out, each below a thousandth of the
8B model's step: norms, softmax, resizing, phi convolutions, nearest codes.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from argenseg_jax.config import LoRAConfig, StageConfig
from argenseg_jax.model_config import (
  LLMConfig,
  ModelConfig,
  VisionConfig,
  VQVAEConfig,
)
from argenseg_jax.models import remat

Number = int | float


class Product(NamedTuple):
  """`count` products [m k] x [k n] of a forward pass over one row.

  Attributes:
    part: dotted prefix of the parameters it belongs to.
    weights: whether [k n] are parameters.
    makes: for a product of a stack of layers (`count` of them), the value that
      remat computes again unless its policy keeps it: one of `remat.VALUES`,
      "vision", or "nothing" that a backward pass needs; "" elsewhere.
  """

  part: str
  m: Number
  k: int
  n: Number
  count: Number = 1
  weights: bool = True
  makes: str = ""

  @property
  def flops(self) -> Number:
    return 2 * self.m * self.k * self.n * self.count


class Step(NamedTuple):
  """FLOPs of one optimization step over the global batch."""

  model: Number
  recomputed: Number

  @property
  def total(self) -> Number:
    return self.model + self.recomputed


class Pass(NamedTuple):
  """A product in training: how often it, or a product of its size, is run."""

  product: Product
  model: int  # Forward, gradient of the input, gradient of the weights.
  recomputed: int
  trains: bool


def training_passes(
  products: Iterable[Product],
  stage: StageConfig,
  *,
  constant: tuple[str, ...] = (),
  adapters: LoRAConfig | None = None,
) -> Iterator[Pass]:
  """How often each product of one row is run in a training step.

  Args:
    products: of the forward pass, in the order that gradients come from.
    stage: frozen parts and remat.
    constant: parts that pass no gradient and get none, whatever is frozen.
    adapters: if they train instead of the weights; their own products, a
      hundredth at rank 16 and width 4,096, are left out.
  """
  frozen = (*stage.optimizer.frozen, *constant)
  gradient = False  # Whether something before this product trains.
  for product in products:
    trains = product.weights and not _is_under(product.part, frozen)
    if adapters is not None:
      trains = product.weights and _is_under(product.part, adapters.train)
      gradient = gradient or (
        product.weights and _has_adapters(product.part, adapters)
      )
    passes = 1 + gradient + (trains if product.weights else gradient)
    gradient = gradient or trains
    again = passes > 1 and (
      product.part == "llm.head" or _is_repeated(product, stage.train.remat)
    )
    yield Pass(product, passes, int(again), trains)


def _is_repeated(product: Product, policy: str) -> bool:
  if product.makes in remat.VALUES:
    return product.makes not in remat.POLICIES[policy].keeps
  if product.makes != "vision" or policy == "none":
    return False
  return policy != "dots" or not product.weights


def train_step(
  products: Iterable[Product],
  stage: StageConfig,
  *,
  constant: tuple[str, ...] = (),
  adapters: LoRAConfig | None = None,
) -> Step:
  """FLOPs of a step over the global batch; arguments as `training_passes`."""
  passes = list(
    training_passes(products, stage, constant=constant, adapters=adapters)
  )
  rows = stage.train.global_batch_size
  return Step(
    rows * sum(p.product.flops * p.model for p in passes),
    rows * sum(p.product.flops * p.recomputed for p in passes),
  )


# Of a matrix's parameter, where they are not 8.
_MOMENT_BYTES = {"muon": 4, "adafactor": 2}


def hbm_bytes(
  products: Iterable[Product],
  stage: StageConfig,
  *,
  parts: int,
  fsdp: int,
  constant: tuple[str, ...] = (),
  adapters: LoRAConfig | None = None,
) -> Number:
  """Bytes that one device reads and writes in a step, at least.

  Every product reads and writes its operands once a pass, in the compute dtype
  (attention's scores stay on the chip); the optimizer reads and writes master
  weights and moments, and reads gradients, in float32 (Adafactor's one moment
  in bfloat16).

  Args:
    products, stage, constant, adapters: as in `training_passes`.
    parts: into how many the batch is split.
    fsdp: into how many the parameters are split.
  """
  width = 2 if stage.train.compute_dtype == "bfloat16" else 4
  turns = stage.train.accumulate_steps
  rows = stage.train.global_batch_size / parts
  moments = _MOMENT_BYTES.get(stage.optimizer.name, 8)
  total = 0.0
  for product, passes, again, trains in training_passes(
    products, stage, constant=constant, adapters=adapters
  ):
    times = passes + again
    operands = product.m * product.k * product.count * rows
    results = product.m * product.n * product.count * rows
    if product.weights:
      # An image tokenizer's or a layer's weights serve all rows of a turn.
      layers = product.count if product.makes else 1
      weights = product.k * product.n * layers
      total += width * times * (operands + results + weights * turns)
      total += (12 + 2 * moments) * trains * weights / fsdp
    else:
      total += width * times * operands
  return total


def _has_adapters(part: str, adapters: LoRAConfig) -> bool:
  return any(
    target.startswith(("*", f"{part}.")) for target in adapters.targets
  )


def _is_under(part: str, prefixes: tuple[str, ...]) -> bool:
  return any(f"{part}.".startswith(f"{prefix}.") for prefix in prefixes)


def mllm(
  model: ModelConfig,
  length: int,
  images: int,
  seg_masks: int,
  *,
  tokenized: bool = False,
) -> Iterator[Product]:
  """Products of one row, in the order that gradients come from."""
  if not tokenized:
    yield from image_tokenizer(model.vqvae, seg_masks, decode=False)
  yield from vision(model.vision, model.llm.width, images)
  yield Product(
    "word_embed",
    seg_masks * (model.vqvae.codes_per_mask - 1),
    model.vqvae.latent_channels,
    model.llm.width,
  )
  yield from decoder(model.llm, length)


def decoder(llm: LLMConfig, length: int) -> Iterator[Product]:
  """The language model with its head over `length` positions; causal
  attention sees half of the keys."""
  d, t, hd = llm.width, length, llm.head_dim

  def of_layers(m, k, n, makes, each=1, weights=True):
    count = each * llm.num_layers
    return Product("llm.layers", m, k, n, count, weights, makes)

  heads = (llm.num_heads + 2 * llm.num_kv_heads) * hd
  yield of_layers(t, d, heads, remat.QKV)
  scores = 2 * llm.num_heads  # And their products with values.
  yield of_layers(t, hd, (t + 1) / 2, remat.ATTENTION, scores, weights=False)
  yield of_layers(t, llm.num_heads * hd, d, remat.MLP_INPUT)
  yield of_layers(t, d, llm.mlp_width, remat.MLP_HIDDEN, 2)
  yield of_layers(t, llm.mlp_width, d, "nothing")
  yield Product("llm.head", t, d, llm.vocab_size)


def vision(config: VisionConfig, width: int, images: int) -> Iterator[Product]:
  """Tower (the layers that are read) and connector."""
  d, patches = config.width, config.grid_side**2
  if config.stem == "patch":
    yield Product("vision.tower", images * patches, 3 * config.patch_side**2, d)
  else:
    steps = config.patch_side.bit_length() - 1
    widths = [3] + [d // 2 ** (steps - 1 - i) for i in range(steps)]
    for i in range(steps):
      side = config.image_side // 2 ** (i + 1)
      yield Product(
        "vision.tower", images * side**2, 9 * widths[i], widths[i + 1]
      )
    for _ in range(config.stem_blocks):
      yield Product("vision.tower", images * patches, 9 * d, d)
  layers = config.select_layer % (config.num_layers + 1)
  t = patches + 1
  again = {"count": layers, "makes": "vision"}
  yield Product("vision.tower", images * t, d, 4 * d, **again)
  attention = {**again, "count": 2 * images * layers}
  yield Product("vision.tower", t, d, t, weights=False, **attention)
  yield Product("vision.tower", images * t, d, 2 * config.mlp_width, **again)
  merged = d * config.pixel_shuffle**2
  tokens = images * config.num_embeddings
  yield Product("vision.connector", tokens, merged, width)
  yield Product("vision.connector", tokens, width, width)


def image_tokenizer(
  config: VQVAEConfig, images: int, *, decode: bool, part: str = "vqvae"
) -> Iterator[Product]:
  """Encoder; the decoder too, if asked for. `part` is where it stands."""
  c = config.latent_channels
  side = config.image_side // config.patch_side
  widths = [config.width * m for m in config.width_multipliers]
  pixels = 3 * config.patch_side**2

  def conv(at, i, o, taps=9):
    return Product(part, images * at * at, taps * i, o)

  def block(at, i, o):
    yield conv(at, i, o)
    yield conv(at, o, o)
    if i != o:
      yield conv(at, i, o, 1)

  def attention(at, w):
    yield conv(at, w, 4 * w, 1)  # Queries, keys, values and output.
    yield Product(part, at * at, w, at * at, 2 * images, weights=False)

  def middle(at, w):
    yield from block(at, w, w)
    yield from attention(at, w)
    yield from block(at, w, w)

  at, w = side, widths[0]
  yield conv(at, pixels, w)
  for level, width in enumerate(widths):
    last = level == len(widths) - 1
    for _ in range(config.blocks_per_level):
      yield from block(at, w, width)
      w = width
      if last:
        yield from attention(at, w)
    if not last:
      at //= 2
      yield conv(at, w, w)
  yield from middle(at, w)
  yield conv(at, w, c)
  yield conv(at, c, c)  # quant_conv
  if not decode:
    return
  yield conv(at, c, c)  # post_quant_conv
  yield conv(at, c, w)
  yield from middle(at, w)
  for level, width in reversed(list(enumerate(widths))):
    for _ in range(config.blocks_per_level + 1):
      yield from block(at, w, width)
      w = width
      if level == len(widths) - 1:
        yield from attention(at, w)
    if level:
      at *= 2
      yield conv(at, w, w)
  yield conv(at, w, pixels)
