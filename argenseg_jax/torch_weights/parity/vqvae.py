"""Parity of the image tokenizer: codes, images, losses, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.models.vq import Quantizer
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.torch_weights import hf_config, rules
from argenseg_jax.torch_weights.parity.compare import (
  Check,
  Golden,
  gradient_checks,
  torch_gradients,
)
from argenseg_jax.torch_weights.tables import Table


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


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
  """What this code makes of a folder's inputs; each program runs once."""

  golden: Golden
  table: Table
  graph: nnx.GraphDef
  state: nnx.State

  @functools.cached_property
  def images(self) -> jax.Array:
    return jnp.asarray(np.moveaxis(self.golden["in.image"], 1, -1))

  @functools.cached_property
  def heavy(self) -> jax.Array:
    """The first images: all that the recorder decoded and trained on."""
    return self.images[: self.golden.config.get("heavy_batch")]

  @functools.cached_property
  def recorded(self) -> jax.Array:
    return jnp.asarray(self.golden["out.idx"], jnp.int32)

  @functools.cached_property
  def forward(self) -> dict[str, jax.Array]:
    """Everything that needs no gradient, as one program."""
    # The recorder kept the partial latents of the first images only.
    num_prefixes = len(self.golden.arrays.get("out.f_hat_prefix", (0,)))

    @jax.jit
    def run(state):
      model = nnx.merge(self.graph, state)
      quantizer = model.quantizer
      encoded = model.encoder(self.images)
      latent = model.quant_conv(encoded)
      gaps, choices = margins(quantizer, latent, self.recorded)
      return {
        "encoded": encoded,
        "latent": latent,
        "gaps": gaps,
        "choices": choices,
        "free": quantizer.encode(latent),
        "prefixes": quantizer.prefixes(self.recorded[:num_prefixes]),
        "last": quantizer.sum_scales(self.recorded),
        "inputs": quantizer.scale_inputs(self.recorded),
        "decoded": model.decode_prefixes(self.recorded[: len(self.heavy)]),
      }

    return run(self.state)

  @functools.cached_property
  def generated(self):
    """Next-scale inputs and final latent of codes that no image encodes to."""

    @jax.jit
    def run(state, codes):
      quantizer = nnx.merge(self.graph, state).quantizer
      return quantizer.scale_inputs(codes), quantizer.sum_scales(codes)

    return run(self.state, jnp.asarray(self.golden["in.gen_idx"], jnp.int32))

  @property
  def codes(self) -> jax.Array:
    """Free-running codes; where a recorded toss-up went the other way, each
    scale's choices given the recorded coarser ones."""
    free = self.forward["free"]
    same = np.array_equal(free, self.golden["out.idx"])
    return free if same else self.forward["choices"]

  @property
  def idx_margin(self) -> np.ndarray | jax.Array:
    name = "out.idx_margin"
    return self.golden[name] if name in self.golden else self.forward["gaps"]

  @functools.cached_property
  def trained(self):
    """(images, reconstruction loss, VQ loss) and gradients by PyTorch name."""
    params, rest = nnx.split_state(self.state, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
      out = nnx.merge(self.graph, params, rest)(self.heavy)
      fit = jnp.mean((out.images - self.heavy) ** 2)
      vq_loss = jnp.mean(out.vq_loss)
      return fit + vq_loss, (out.images, fit, vq_loss)

    (_, values), gradients = loss(params)
    return values, torch_gradients(self.table, gradients)

  @property
  def routes(self) -> jax.Array:
    """How far training's images are from those that codes decode to."""
    images = jnp.clip(self.trained[0][0], -1, 1)
    return jnp.max(jnp.abs(images - self.forward["decoded"][:, -1]))[None]

  @functools.cached_property
  def quantized(self):
    """The quantizer alone, on the latent as a leaf: its loss, its output, the
    gradients of the latent and of the codebook."""
    params, rest = nnx.split_state(self.state, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(latent, params):
      out = nnx.merge(self.graph, params, rest).quantizer(latent)
      return jnp.mean(out.loss), out.latent

    found = loss(self.forward["latent"], params)
    (value, latents), (to_latent, to_params) = found
    gradients = torch_gradients(self.table, to_params)
    return value, latents, to_latent, gradients["quantize.embedding.weight"]


def checks(golden: Golden) -> dict[str, Check]:
  """One check for every array that this kind of folder may hold."""
  where = str(golden.path)
  config = hf_config.vqvae_config(
    golden.config | {"vae": golden.config}, golden.weights.tensors, where
  )
  table = rules.vqvae(config)
  graph, state = golden.load(
    lambda: VQVAE(config, rngs=construct.Rngs(0)), table
  )
  ours = Computed(golden, table, graph, state)

  def first(name):
    return Check(lambda: channels_first(ours.forward[name]))

  def thin(make):
    """Images as the recorder kept them: each n-th row and column."""
    step = slice(None, None, golden.config.get("decode_subsample", 1))
    return Check(lambda: channels_first(make())[..., step, step])

  return {
    "out.encoder_out": first("encoded"),
    "out.f": first("latent"),
    "out.idx": Check(lambda: ours.codes, margin=lambda: ours.idx_margin),
    "out.idx_margin": Check(lambda: ours.forward["gaps"]),
    "out.f_hat_last": first("last"),
    "out.f_hat_prefix": first("prefixes"),
    "out.var_input": Check(lambda: ours.forward["inputs"]),
    "out.gen_next_inputs": Check(lambda: ours.generated[0]),
    "out.gen_f_hat_final": Check(lambda: channels_first(ours.generated[1])),
    "out.decode_prefix_sub": thin(lambda: ours.forward["decoded"]),
    "out.decode_final": Check(
      lambda: channels_first(ours.forward["decoded"][:, -1])
    ),
    # A difference of two images in [-1, 1].
    "out.recon_minus_decode_maxabs": Check(lambda: ours.routes, scale=1.0),
    "out.train_vq_loss": Check(lambda: ours.trained[0][2][None]),
    "out.train_rec_mse": Check(lambda: ours.trained[0][1][None]),
    "out.train_rec_sub": thin(lambda: ours.trained[0][0]),
    "out.quant_f_hat_st": Check(lambda: channels_first(ours.quantized[1])),
    "out.quant_loss": Check(lambda: ours.quantized[0][None]),
    "out.quant_grad_f": Check(lambda: channels_first(ours.quantized[2])),
    "out.quant_grad_codebook": Check(lambda: ours.quantized[3]),
    **gradient_checks(
      golden, "out.", "out.grad_names", lambda: ours.trained[1]
    ),
  }
