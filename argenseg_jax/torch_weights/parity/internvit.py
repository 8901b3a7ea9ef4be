"""Parity of the vision tower, the pixel shuffle and the connector."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.models import vit
from argenseg_jax.torch_weights import hf_config, rules
from argenseg_jax.torch_weights.parity.compare import (
  Check,
  Golden,
  gradient_checks,
  torch_gradients,
)


def checks(golden: Golden) -> dict[str, Check]:
  """One check for every array that this kind of folder may hold."""
  config = hf_config.vision_config(golden.config)
  width = golden.weights.tensors["mlp1.3.bias"].shape[0]
  table = rules.internvit(config)
  graph, state = golden.load(
    lambda: vit.VisionEncoder(config, width, rngs=construct.Rngs(0)), table
  )

  def pixels(name):
    return jnp.asarray(np.moveaxis(golden[name], 1, -1))

  @functools.cache
  def plain():
    """All hidden states, both pixel shuffles of the last, the embeddings."""

    @jax.jit
    def run(state):
      model = nnx.merge(graph, state)
      images = pixels("in.pixel_values")
      hidden = jnp.stack(
        [
          model.tower(images, num_layers=n)
          for n in range(config.num_layers + 1)
        ]
      )
      patches = hidden[-1][:, 1:]
      side = round(patches.shape[1] ** 0.5)
      grid = patches.reshape(-1, side, side, patches.shape[-1])
      shuffles = [
        vit.pixel_shuffle(grid, config.pixel_shuffle, transposed=transposed)
        for transposed in (False, True)
      ]
      return hidden, *shuffles, model(images)

    return run(state)

  @functools.cache
  def big():
    @jax.jit
    def run(state):
      model = nnx.merge(graph, state)
      images = pixels("in.pixel_values_big")
      side = images.shape[1] // config.patch_side
      positions = model.tower.positions(side)[None]
      return model.tower(images), model(images), positions

    return run(state)

  @functools.cache
  def gradients():
    """Of sum(embeddings * cos(flat index))."""

    @jax.jit
    @jax.grad
    def of(state):
      embeddings = nnx.merge(graph, state)(pixels("in.pixel_values"))
      weights = np.cos(np.arange(embeddings.size, dtype=np.float32))
      return jnp.sum(embeddings.reshape(-1) * weights)

    return torch_gradients(table, of(state))

  return {
    "out.hidden_states": Check(lambda: plain()[0]),
    "out.last_hidden_state": Check(lambda: plain()[0][-1]),
    "out.pixel_shuffle_v2": Check(lambda: plain()[1]),
    "out.pixel_shuffle_v1": Check(lambda: plain()[2]),
    "out.image_embeds": Check(lambda: plain()[3]),
    "out.big_last_hidden_state": Check(lambda: big()[0]),
    "out.big_image_embeds": Check(lambda: big()[1]),
    "out.big_pos_embed": Check(lambda: big()[2]),
    **gradient_checks(golden, "out.", "out.grad_names", gradients),
  }
