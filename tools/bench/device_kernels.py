"""Measurements of `argenseg bench device` of kernels and attention alone."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from argenseg_jax.kernels.dispatch import Implementation
from argenseg_jax.tools.bench.device_timing import (
  REPEATS,
  Result,
  bound_ms,
  chip,
  random,
  result,
  time_all,
  wait,
)
from argenseg_jax.tools.bench.timing import median_seconds, trace


def ceilings(tiny: bool) -> Iterator[Result]:
  side, size = (512, 2**20) if tiny else (8192, 2**30)
  a, b = random((side, side)), random((side, side + 64))[:, :side]
  product = jax.jit(jnp.matmul)
  run = functools.partial(wait, product, (a, b))
  run()
  rates = chip()
  seconds = median_seconds(run, REPEATS)
  trace("product", run)
  yield result(
    f"product of {side}",
    2e-12 * side**3 / seconds,
    "TFLOP/s",
    published=rates and rates.flops / 1e12,
  )
  x = random((size,))
  copy = functools.partial(wait, jax.jit(lambda x: -x), (x,))
  copy()
  seconds = median_seconds(copy, REPEATS)
  trace("copy", copy)
  yield result(
    f"copy of {size} bfloat16",
    4e-9 * size / seconds,
    "GB/s",
    published=rates and rates.bandwidth / 1e9,
  )


def correct(tiny: bool) -> Iterator[Result]:
  """Relative errors, on fresh random numbers, against the references."""
  from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy
  from argenseg_jax.kernels.nearest_code import nearest_code
  from argenseg_jax.kernels.scale_prediction import scale_prediction

  kernels = ["xla"] if tiny else ["xla", "gpu"]
  if jax.default_backend() == "tpu":
    kernels = ["xla", "tpu"]
  for t, d, vocab in (
    ((150, 320, 300),)
    if tiny
    else (
      (150, 320, 300),
      (2048, 4096, 9665),
    )
  ):
    hidden, head = random((t, d), scale=1), random((vocab, d), scale=d**-0.5)
    targets = jax.random.randint(jax.random.key(1), (t,), 0, vocab)
    weights = jax.random.uniform(jax.random.key(2), (t,))

    def loss(hidden, head, weights, kind, targets=targets):
      losses = linear_cross_entropy(
        hidden, head, targets, weights, z_loss=1e-3, implementation=kind
      )
      return jnp.sum(losses)

    def both(kind, hidden=hidden, head=head, weights=weights, loss=loss):
      grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
      return jax.jit(grad, static_argnums=3)(hidden, head, weights, kind)

    expected = both("reference")
    for kind in kernels:
      yield from _error(
        f"loss {kind} {t} x {vocab} x {d}", both, kind, expected
      )
  hidden, head = random((1, 300, 256), scale=1), random((4096, 256))
  codebook = random((4096, 32), "float32", 1)

  def predict(kind):
    found = scale_prediction(hidden, head, codebook, implementation=kind)
    return found[0].astype(jnp.float32)

  def nearest(kind):
    latent = random((1000, 32), "float32", 1)
    found = nearest_code(latent, codebook, implementation=kind)
    return found.astype(jnp.float32)

  for kind in kernels:
    yield from _error(f"prediction {kind}", predict, kind, predict("reference"))
    yield from _error(f"nearest {kind}", nearest, kind, nearest("reference"))


def _error(name, function, kind, expected) -> Iterator[Result]:
  try:
    found = function(kind)
  except Exception as error:
    yield {"failed": name, "why": str(error).splitlines()[0][:300]}
    return
  errors = jax.tree.map(
    lambda a, b: float(
      jnp.linalg.norm((a - b).astype(jnp.float32).ravel())
      / jnp.linalg.norm(b.astype(jnp.float32).ravel())
    ),
    found,
    expected,
  )
  yield result(f"error of {name}", max(jax.tree.leaves(errors)), "relative")


def loss(tiny: bool) -> Iterator[Result]:
  from argenseg_jax.kernels.linear_cross_entropy import linear_cross_entropy

  shapes = (
    ((64, 64, 300),)
    if tiny
    else (
      (8192, 4096, 96_653),
      (16_384, 896, 151_674),
    )
  )
  kinds: list[Implementation] = (
    ["xla", "reference"] if tiny else ["gpu", "xla", "reference"]
  )
  for t, d, words in shapes:
    targets = jax.random.randint(jax.random.key(1), (t,), 0, words)
    inputs = random((t, d), scale=1), random((words, d), scale=d**-0.5)
    inputs = *inputs, targets, jnp.ones(t)
    programs = {}
    for kind in kinds:

      def total(hidden, head, targets, weights, kind: Implementation = kind):
        losses = linear_cross_entropy(
          hidden, head, targets, weights, implementation=kind
        )
        return jnp.sum(losses)

      grad = jax.value_and_grad(total, argnums=(0, 1))
      name = f"loss and gradients, {t} x {words} x {d}, {kind}"
      programs[name] = grad, inputs
    yield from time_all(programs, bound=bound_ms(6 * t * d * words, 0))


def prediction(tiny: bool) -> Iterator[Result]:
  """Many predictions in one program: a call costs more than the work."""
  from argenseg_jax.kernels.scale_prediction import scale_prediction

  kinds: list[Implementation] = (
    ["xla", "reference"] if tiny else ["gpu", "xla", "reference"]
  )
  times = 4 if tiny else 64
  for rows in (64,) if tiny else (1, 64, 256, 4096):
    d, codes = (64, 128) if tiny else (4096, 4096)
    inputs = random((1, rows, d), scale=1), random((codes, d))
    inputs = *inputs, random((codes, 32), "float32", 1)
    programs = {}
    for kind in kinds:

      def many(
        hidden, head, codebook, kind: Implementation = kind, times=times
      ):
        def one(hidden, _):
          found, *_ = scale_prediction(
            hidden, head, codebook, implementation=kind
          )
          # The next turn depends on this one.
          hidden = hidden + (found[..., None] < 0).astype(hidden.dtype)
          return hidden, found[0, 0]

        return jax.lax.scan(one, hidden, length=times)

      programs[f"prediction, {rows} rows, {kind}"] = many, inputs
    bound = bound_ms(2 * rows * d * codes, 2 * (rows + codes) * d)
    yield from time_all(programs, bound=bound, times=times)


def attention(tiny: bool) -> Iterator[Result]:
  """Value and gradient, by the library and plain."""
  shapes = {
    "causal, 8B": (4, 2048, 32, 8, 128),
    "causal, 1B": (16, 1024, 14, 2, 64),
    "full, vision tower": (16, 1025, 16, 16, 64),
  }
  if tiny:
    shapes = {"causal, tiny": (1, 64, 2, 1, 32)}
  for what, shape in shapes.items():
    yield from _attention(what, *shape)


def _attention(what, b, t, heads, kv, hd) -> Iterator[Result]:
  from argenseg_jax.models import attention as attention_lib

  causal = what.startswith("causal")
  inputs = tuple(
    random((b, t, n, hd), scale=1) * (1 + i)
    for i, n in enumerate((heads, kv, kv))
  )
  segments = jnp.ones((b, t), jnp.int32)
  reach = jnp.broadcast_to(jnp.arange(t), (b, t))
  visible = attention_lib.Visible(reach, segments, segments)

  def plain(q, k, v):
    mask = attention_lib.attention_mask(*visible) if causal else None
    return attention_lib.attend(q, k, v, mask)

  def library(q, k, v):
    return attention_lib.attend_by_library(q, k, v, visible if causal else None)

  def cudnn(q, k, v):
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=causal, implementation="cudnn"
    )

  def gradient(function):
    def total(q, k, v):
      out = function(q, k, v).astype(jnp.float32)
      return jnp.sum(
        out * jnp.cos(jnp.arange(t, dtype=out.dtype))[:, None, None]
      )

    return jax.value_and_grad(total, argnums=(0, 1, 2))

  forms = {"plain": plain}
  if jax.default_backend() == "gpu":
    forms["by library"] = library
    if not t % 2:
      forms["cudnn"] = cudnn
  scores = 4 * b * t * t * heads * hd / (2 if causal else 1)
  yield from time_all(
    {f"{what}, value, {n}": (f, inputs) for n, f in forms.items()},
    bound=bound_ms(scores, 0),
  )
  grads = {n: gradient(f) for n, f in forms.items()}
  yield from time_all(
    {f"{what}, gradient, {n}": (f, inputs) for n, f in grads.items()},
    bound=bound_ms(3.5 * scores, 0),
  )
  expected = jax.jit(grads["plain"])(*inputs)[1]
  for name in forms:
    yield from _error(
      f"gradient of {what}, {name}",
      lambda name: jax.jit(grads[name])(*inputs)[1],
      name,
      expected,
    )
