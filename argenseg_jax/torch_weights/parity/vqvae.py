"""Parity of the image tokenizer: codes, pictures, losses, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax.models.vq import Quantizer
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.torch_weights import hf_config, rules
from argenseg_jax.torch_weights.parity.compare import (
  Check,
  Golden,
  gradient_checks,
  torch_gradients,
)


def margins(quantizer: Quantizer, latent, codes):
  """Second-best minus best squared distance of each choice, given `codes`.

  Returns:
    float32 [b n], and the codes that each scale would choose given the coarser
    ones of `codes`.
  """
  partial = jnp.zeros_like(latent)
  gaps, choices = [], []
  for k, codes_k in enumerate(quantizer.scales.split(codes)):
    vectors = quantizer.vectors_at(latent - partial, k)
    book = quantizer.codebook[...]
    distances = jnp.sum((vectors[:, :, None] - book) ** 2, -1)
    best = jax.lax.top_k(-distances, 2)[0]
    gaps.append(best[..., 0] - best[..., 1])
    choices.append(quantizer.nearest(vectors, k))
    partial = quantizer.add_scale(partial, codes_k, k)
  return jnp.concatenate(gaps, 1), jnp.concatenate(choices, 1)


def channels_first(x):
  """[... h w c] to PyTorch's [... c h w]."""
  return jnp.moveaxis(x, -1, -3)


def checks(golden: Golden) -> dict[str, Check]:
  """One check for every array that this kind of folder may hold."""
  where = str(golden.path)
  config = hf_config.vqvae_config(
    golden.config | {"vae": golden.config}, golden.weights.tensors, where
  )
  table = rules.vqvae(config)
  graph, state = golden.load(lambda: VQVAE(config, rngs=nnx.Rngs(0)), table)
  images = jnp.asarray(np.moveaxis(golden["in.image"], 1, -1))
  heavy = images[: golden.config.get("heavy_batch", len(images))]

  recorded = jnp.asarray(golden["out.idx"], jnp.int32)
  few = recorded[: len(heavy)]
  # The recorder kept these of the first pictures only.
  num_prefixes = len(golden.arrays.get("out.f_hat_prefix", (0,)))

  @functools.cache
  def forward():
    """Everything that needs no gradient, as one program."""

    @jax.jit
    def run(state):
      model = nnx.merge(graph, state)
      quantizer = model.quantizer
      encoded = model.encoder(images)
      latent = model.quant_conv(encoded)
      gaps, choices = margins(quantizer, latent, recorded)
      return {
        "encoded": encoded,
        "latent": latent,
        "gaps": gaps,
        "choices": choices,
        "free": quantizer.encode(latent),
        "prefixes": quantizer.prefixes(recorded[:num_prefixes]),
        "last": quantizer.sum_scales(recorded),
        "inputs": quantizer.scale_inputs(recorded),
        "decoded": model.decode_prefixes(few),
      }

    return run(state)

  @functools.cache
  def generated():
    """Next-scale inputs and final latent of codes that nothing was coded to."""

    @jax.jit
    def run(state, codes):
      quantizer = nnx.merge(graph, state).quantizer
      return quantizer.scale_inputs(codes), quantizer.sum_scales(codes)

    return run(state, jnp.asarray(golden["in.gen_idx"], jnp.int32))

  def codes():
    """Free-running codes; where a recorded toss-up went the other way, each
    scale's choices given the recorded coarser ones."""
    free = forward()["free"]
    same = np.array_equal(free, golden["out.idx"])
    return free if same else forward()["choices"]

  def routes():
    trained_images = jnp.clip(trained()[0][0], -1, 1)
    return jnp.max(jnp.abs(trained_images - forward()["decoded"][:, -1]))[None]

  @functools.cache
  def trained():
    params, rest = nnx.split_state(state, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
      out = nnx.merge(graph, params, rest)(heavy)
      fit = jnp.mean((out.images - heavy) ** 2)
      return fit + out.vq_loss, (out.images, fit, out.vq_loss)

    (_, values), gradients = loss(params)
    return values, torch_gradients(table, gradients)

  @functools.cache
  def quantized():
    """The quantiser alone, on the latent as a leaf."""
    params, rest = nnx.split_state(state, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(latent, params):
      out = nnx.merge(graph, params, rest).quantizer(latent)
      return out.loss, out.latent

    (value, latents), (to_latent, to_params) = loss(forward()["latent"], params)
    gradients = torch_gradients(table, to_params)
    return value, latents, to_latent, gradients["quantize.embedding.weight"]

  def first(name):
    return Check(lambda: channels_first(forward()[name]))

  def thin(make):
    """Pictures as the recorder kept them: each n-th row and column."""
    step = slice(None, None, golden.config.get("decode_subsample", 1))
    return Check(lambda: channels_first(make())[..., step, step])

  def idx_margin():
    name = "out.idx_margin"
    return golden[name] if name in golden else forward()["gaps"]

  return {
    "out.encoder_out": first("encoded"),
    "out.f": first("latent"),
    "out.idx": Check(codes, margin=idx_margin),
    "out.idx_margin": Check(lambda: forward()["gaps"]),
    "out.f_hat_last": first("last"),
    "out.f_hat_prefix": first("prefixes"),
    "out.var_input": Check(lambda: forward()["inputs"]),
    "out.gen_next_inputs": Check(lambda: generated()[0]),
    "out.gen_f_hat_final": Check(lambda: channels_first(generated()[1])),
    "out.decode_prefix_sub": thin(lambda: forward()["decoded"]),
    "out.decode_final": Check(
      lambda: channels_first(forward()["decoded"][:, -1])
    ),
    # A difference of two pictures in [-1, 1].
    "out.recon_minus_decode_maxabs": Check(routes, scale=1.0),
    "out.train_vq_loss": Check(lambda: trained()[0][2][None]),
    "out.train_rec_mse": Check(lambda: trained()[0][1][None]),
    "out.train_rec_sub": thin(lambda: trained()[0][0]),
    "out.quant_f_hat_st": Check(lambda: channels_first(quantized()[1])),
    "out.quant_loss": Check(lambda: quantized()[0][None]),
    "out.quant_grad_f": Check(lambda: channels_first(quantized()[2])),
    "out.quant_grad_codebook": Check(lambda: quantized()[3]),
    **gradient_checks(golden, "out.", "out.grad_names", lambda: trained()[1]),
  }
