"""Analytic FLOPs against the products that a trace of the model holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.config_parsing import replace, run_config
from argenseg_jax.configs import base
from argenseg_jax.models import flops, remat

CONFIG = replace(
  tiny_model.config(),
  {"vision.num_layers": 2, "vision.select_layer": -1, "llm.num_layers": 5},
)


def traced(function, *inputs) -> float:
  """FLOPs of the products and convolutions of a function, loops unrolled."""
  return _count(jax.make_jaxpr(function)(*inputs).jaxpr)


def _count(jaxpr) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    if not eqn.outvars:
      continue
    out = np.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += 2 * out * np.prod([shape[i] for i in contracted])
    elif eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      spec = eqn.params["dimension_numbers"].rhs_spec
      total += 2 * out * np.prod(kernel) / kernel[spec[0]]
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += times * _count(inner)
  return total


def analytic(products) -> tuple[float, float]:
  """FLOPs of products with weights, and of attention."""
  products = list(products)
  return (
    sum(p.flops for p in products if p.weights),
    sum(p.flops for p in products if not p.weights),
  )


@pytest.fixture(scope="module")
def model():
  return tiny_model.ARGenSeg(CONFIG, rngs=construct.Rngs(0))


def test_decoder(model):
  t = 6
  graph, state = nnx.split(model.llm)
  ids = jnp.ones((1, t), jnp.int32)

  def run(state):
    llm = nnx.merge(graph, state)
    hidden, _ = llm(llm.embed(ids), positions=ids, segment_ids=ids)
    return jnp.sum(hidden @ llm.head.T)

  weights, attention = analytic(flops.decoder(CONFIG.llm, t))
  # XLA computes the upper half of the scores too.
  attention *= 2 * t / (t + 1)
  assert traced(run, state) == weights + attention
  assert traced(jax.grad(run), state) == pytest.approx(
    3 * (weights + attention), rel=0.01
  )


@pytest.mark.parametrize("policy", remat.POLICIES)
def test_what_remat_repeats_is_what_is_traced(model, policy):
  """The plain form of attention runs again under all of them but "none"."""
  t = 6
  graph, state = nnx.split(model.llm)
  ids = jnp.ones((1, t), jnp.int32)

  def run(state):
    llm = nnx.merge(graph, state)
    options = {"remat_policy": remat.POLICIES[policy].policy}
    hidden, _ = llm(llm.embed(ids), positions=ids, segment_ids=ids, **options)
    return jnp.sum(hidden)

  layers = [p for p in flops.decoder(CONFIG.llm, t) if p.part == "llm.layers"]
  stage = run_config(base.get_config(), needs_data=False).mllm
  stage = replace(stage, {"train.remat": policy})
  again = [
    p.product.flops * p.recomputed
    for p in flops.training_passes(layers, stage)
    if p.product.weights
  ]
  weights, attention = analytic(layers)
  attention *= 2 * t / (t + 1) * (4 if policy != "none" else 3)
  # Of the first product's input comes a gradient here.
  assert traced(jax.grad(run), state) == pytest.approx(
    3 * weights + sum(again) + attention
  )


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_vision(stem):
  blocks = 2 if stem == "conv" else 0
  config = replace(CONFIG, {"vision.stem": stem, "vision.stem_blocks": blocks})
  model = tiny_model.ARGenSeg(config, rngs=construct.Rngs(0))
  images = jnp.zeros((1, 2, 16, 16, 3))
  total = sum(analytic(flops.vision(config.vision, 16, 2)))
  assert traced(model.vision_embeddings, images) == total


def test_image_tokenizer(model):
  images = jnp.zeros((3, 16, 16, 3))
  encoder = sum(analytic(flops.image_tokenizer(CONFIG.vqvae, 3, decode=False)))
  both = sum(analytic(flops.image_tokenizer(CONFIG.vqvae, 3, decode=True)))
  assert traced(model.vqvae.encode_latent, images) == encoder
  latent = jnp.zeros((3, 4, 4, 4))
  assert traced(model.vqvae.decode_latent, latent) == both - encoder


def step(**changes):
  values = base.get_config()
  values.data.path = "unused"
  stage = run_config(values).mllm
  stage = replace(stage, changes)
  return flops.train_step(
    flops.mllm(CONFIG, 32, 1, 1), stage, constant=("vqvae",)
  )


def test_frozen_parts_cost_one_pass_and_remat_one_more():
  rows = 128
  frozen = step()
  tower = [
    p for p in flops.vision(CONFIG.vision, 16, 1) if p.part == "vision.tower"
  ]
  trained = step(**{"optimizer.frozen": ["vqvae"]})
  up = next(
    p for p in flops.vision(CONFIG.vision, 16, 1) if p.part != "vision.tower"
  )
  # The first product has no input that wants a gradient; the connector gains
  # one.
  extra = 2 * sum(p.flops for p in tower) - tower[0].flops + up.flops
  assert trained.model - frozen.model == pytest.approx(rows * extra)
  head = 2 * 32 * 16 * 31 * rows
  assert step(**{"train.remat": "none"}).recomputed == head
  layers = sum(
    p.flops
    for p in flops.decoder(CONFIG.llm, 32)
    if p.part == "llm.layers" and p.makes != "nothing"
  )
  assert frozen.recomputed == pytest.approx(rows * layers + head)
  attention = analytic(flops.decoder(CONFIG.llm, 32))[1]
  assert step(**{"train.remat": "dots"}).recomputed == pytest.approx(
    rows * attention + head
  )


def test_weights_under_adapters_only_pass_gradients_on():
  values = base.get_config()
  values.data.path = "unused"
  values.lora.rank = 2
  config = run_config(values)
  found = flops.train_step(
    flops.mllm(CONFIG, 32, 1, 1),
    config.mllm,
    constant=("vqvae",),
    adapters=config.adapters("mllm"),
  )
  weights, attention = analytic(flops.decoder(CONFIG.llm, 32))
  before = sum(
    p.flops
    for p in flops.mllm(CONFIG, 32, 1, 1)
    if not p.part.startswith("llm.")
  )
  assert found.model == pytest.approx(
    128 * (before + 2 * weights + 3 * attention)
  )


def test_traffic_grows_with_turns_and_shrinks_with_parts():
  values = base.get_config()
  values.data.path = "unused"
  stage = run_config(values).mllm

  def traffic(parts=8, fsdp=8, **changes):
    train = dataclasses.replace(stage.train, **changes)
    return flops.hbm_bytes(
      flops.mllm(CONFIG, 32, 1, 1),
      dataclasses.replace(stage, train=train),
      parts=parts,
      fsdp=fsdp,
    )

  assert traffic(parts=16) < traffic()
  assert traffic(fsdp=16) < traffic()
  assert traffic(accumulate_steps=2) > traffic()


@pytest.mark.parametrize(
  ("name", "size"), [("adamw", 28), ("muon", 20), ("adafactor", 16)]
)
def test_the_optimizer_reads_and_writes_what_trains(name, size):
  """Of a weight: it and its moments, read and written; and the gradient read.
  AdamW has two moments in float32, Muon one, Adafactor one in bfloat16."""
  values = base.get_config()
  values.data.path = "unused"
  stage = run_config(values).mllm
  product = flops.Product("llm.layers", 16, 8, 4)

  def traffic(fsdp, frozen=()):
    optimizer = dataclasses.replace(stage.optimizer, name=name, frozen=frozen)
    return flops.hbm_bytes(
      [product],
      dataclasses.replace(stage, optimizer=optimizer),
      parts=1,
      fsdp=fsdp,
    )

  assert traffic(fsdp=1) - traffic(fsdp=2) == size * (8 * 4) / 2
  frozen = ("llm.layers",)
  assert traffic(1, frozen) == traffic(2, frozen)
