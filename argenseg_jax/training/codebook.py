"""What training an image tokenizer from scratch on small data needs besides its
loss: a codebook that starts on the data, revival of dead codes, and costs that
make rare codes rarer (entropy-constrained quantization)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from argenseg_jax import sharding
from argenseg_jax.models.vqvae import VQVAE


def start_codebook(
  model: VQVAE,
  images: Float[Array, "b h w 3"],
  *,
  key: Array,
  iterations: int,
) -> None:
  """Sets the codebook to k-means centers of the images' residuals.

  Scales are clustered in turn, each on what the coarser ones left over; a
  scale's share of the codes grows with its side length.

  Args:
    model: its codebook is replaced in place.
    images: a few hundred images in [-1, 1].
    key: picks the first centers.
    iterations: of Lloyd's algorithm.
  """
  split = nnx.split(model)
  latent = jnp.concatenate(
    [_encode(*split, x) for x in _chunks(images, split[1])]
  )
  model.quantizer.codebook[...] = _cluster(*split, latent, key, iterations)


def revive_codes(
  model: VQVAE,
  images: Float[Array, "b h w 3"],
  usage: Int[Array, "codes"],
  key: Array,
) -> None:
  """Moves codes that nothing used onto vectors that were just quantized.

  Args:
    model: its codebook is changed in place.
    images: the current batch, in [-1, 1].
    usage: how often each code was used since the last revival.
    key: picks the vectors.
  """
  split = nnx.split(model)
  images = sharding.put_like(images, split[1])
  model.quantizer.codebook[...] = _revived(*split, images, usage, key)


def constrain_entropy(
  model: VQVAE,
  images: Float[Array, "b h w 3"],
  *,
  weight: float,
) -> None:
  """Adds -weight * log(frequency in its scale) to each code's distance.

  Frequencies are counted under the present costs, one round a call. Codes that
  carry little are given up for frequent ones near by, which makes
  them easier to predict at almost no loss of quality. The costs stay in the
  model's `assignment_cost`.

  Args:
    model: its costs are replaced in place.
    images: a few hundred images in [-1, 1].
    weight: squared latent units per nat.
  """
  split = nnx.split(model)
  counts = sum(_counts(*split, x) for x in _chunks(images, split[1]))
  chance = (counts + 0.5) / jnp.sum(counts + 0.5, -1, keepdims=True)
  model.quantizer.assignment_cost[...] = -weight * jnp.log(chance)


def usage_and_perplexity(
  counts: Int[Array, "scales codes"],
) -> tuple[Int[Array, ""], Float[Array, "scales"]]:
  """Number of codes in use, and the perplexity of each scale's codes."""
  chance = counts / jnp.maximum(jnp.sum(counts, -1, keepdims=True), 1)
  entropy = -jnp.sum(chance * jnp.log(jnp.maximum(chance, 1e-10)), -1)
  return jnp.sum(jnp.sum(counts, 0) > 0), jnp.exp(entropy)


@functools.partial(sharding.jit, static_argnums=0)
def _encode(graph, state, images):
  return nnx.merge(graph, state).encode_latent(images)


@functools.partial(sharding.jit, static_argnums=(0, 4))
def _cluster(graph, state, latent, key, iterations):
  """The codebook that `start_codebook` sets."""
  quantizer = nnx.merge(graph, state).quantizer
  sides = quantizer.scales.sides
  num_codes = quantizer.codebook.shape[0]
  ends = [int(n) for n in np.cumsum(sides) * num_codes // sum(sides)]
  partial = jnp.zeros_like(latent)
  # Rows not clustered yet lie too far away to be anybody's nearest code.
  codebook = jnp.full_like(quantizer.codebook[...], 1e4)
  for k, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
    vectors = quantizer.vectors_at(latent - partial, k)
    points = vectors.reshape(-1, vectors.shape[-1])
    centers = _kmeans(
      points, end - start, jax.random.fold_in(key, k), iterations
    )
    codebook = codebook.at[start:end].set(centers)
    quantizer.codebook[...] = codebook
    partial = quantizer.add_scale(partial, quantizer.nearest(vectors, k), k)
  return codebook


@functools.partial(sharding.jit, static_argnums=0)
def _revived(graph, state, images, usage, key):
  """The codebook after `revive_codes`."""
  model = nnx.merge(graph, state)
  vectors = model.quantizer(model.encode_latent(images)).vectors
  points = vectors.reshape(-1, vectors.shape[-1])
  picks = jax.random.choice(key, points.shape[0], usage.shape)
  codebook = model.quantizer.codebook[...]
  return jnp.where(
    (usage == 0)[:, None], points[picks].astype(codebook.dtype), codebook
  )


@functools.partial(sharding.jit, static_argnums=0)
def _counts(graph, state, images):
  model = nnx.merge(graph, state)
  return model.quantizer.count_codes(model.encode(images))


def _chunks(images: Array, state: nnx.State, size: int = 64) -> list[Array]:
  """Parts of a few images, each split over the mesh of `state`."""
  starts = range(0, images.shape[0], size)
  return [sharding.put_like(images[i : i + size], state) for i in starts]


def _kmeans(points: Array, count: int, key: Array, iterations: int) -> Array:
  """Lloyd's algorithm; a center without points stays where it is."""
  picks = jax.random.choice(key, points.shape[0], (count,))
  # A little noise tells apart centers that start on equal points.
  noise = jax.random.normal(key, (count, points.shape[1]))
  centers = points[picks] + 1e-3 * jnp.std(points) * noise

  def improve(_, centers):
    distances = jnp.sum(centers**2, -1) - 2 * points @ centers.T
    nearest = jnp.argmin(distances, -1)
    sums = jnp.zeros_like(centers).at[nearest].add(points)
    counts = jnp.zeros((count,)).at[nearest].add(1.0)[:, None]
    return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centers)

  return jax.lax.fori_loop(0, iterations, improve, centers)
