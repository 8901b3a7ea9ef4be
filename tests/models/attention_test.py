"""Attention against JAX's own, which normalizes before the values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import sharding
from argenseg_jax.config import MeshConfig
from argenseg_jax.models import attention


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_softmax_attention(kv_heads, masked):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (2, 5, 4, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8)
  inputs = [
    5 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)
  ]
  mask = None
  if masked:  # Every query sees the first key at least.
    mask = jax.random.bernoulli(keys[3], 0.5, (2, 5, 7)).at[:, :, 0].set(True)

  def reference(q, k, v):
    whole = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=whole)

  def of(attend):
    def loss(*x):
      return jnp.sum(attend(*x) ** 2)

    return attend(*inputs), jax.grad(loss, argnums=(0, 1, 2))(*inputs)

  mine = of(lambda *x: attention.attend(*x, mask=mask))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3),
    mine,
    of(reference),
  )


def test_a_query_without_keys_gets_the_mean_of_all_values():
  q, k, v = (
    jax.random.normal(jax.random.key(i), (1, 3, 2, 4)) for i in range(3)
  )
  out = attention.attend(q, k, v, mask=jnp.zeros((1, 3, 3), bool))
  mean = jnp.broadcast_to(jnp.mean(v, 1, keepdims=True), v.shape)
  np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("t", "s", "kv_heads", "dtype"),
  [
    (16, 16, 2, "float32"),
    (11, 17, 4, "float32"),
    (9, 5, 1, "bfloat16"),
  ],
)
def test_tiles_give_values_and_gradients_of_whole_attention(
  t, s, kv_heads, dtype
):
  rng = np.random.default_rng(0)
  shapes = (2, t, 4, 8), (2, s, kv_heads, 8), (2, s, kv_heads, 8)
  inputs = [jnp.asarray(rng.standard_normal(n), dtype) for n in shapes]
  # Packed rows whose queries see the first key of their segment at least.
  key_segments = np.sort(rng.integers(1, 3, (2, s)), axis=1)
  key_segments[:, 0] = 1
  query_segments = np.ones((2, t), int)
  reach = rng.integers(0, s + 3, (2, t))
  visible = attention.Visible(
    *(jnp.asarray(x, jnp.int32) for x in (reach, query_segments, key_segments))
  )

  def of(attend):
    def loss(*x):
      mixed = attend(*x)
      return jnp.sum(mixed.astype(jnp.float32) ** 2), mixed

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, mixed), gradients = jax.jit(gradient)(*inputs)
    return mixed, gradients

  tolerance = 1e-4 if dtype == "float32" else 0.1
  for seen in (None, visible):
    mask = None if seen is None else attention.attention_mask(*seen)
    expected = of(lambda *x, mask=mask: attention.attend(*x, mask))
    for side in (4, 64):
      found = of(
        lambda *x, seen=seen, side=side: attention.attend_in_tiles(
          *x, seen, side=side
        )
      )
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
          a.astype(jnp.float32),
          b.astype(jnp.float32),
          rtol=tolerance,
          atol=10 * tolerance,
        ),
        found,
        expected,
      )


def test_tiles_stay_finite_where_a_query_sees_no_key():
  q, k, v = (
    jax.random.normal(jax.random.key(i), (1, 6, 2, 4)) for i in range(3)
  )
  padding = jnp.zeros((1, 6), jnp.int32)
  visible = attention.Visible(padding + jnp.arange(6), padding, padding)
  out, back = jax.vjp(
    lambda *x: attention.attend_in_tiles(*x, visible, side=4), q, k, v
  )
  for x in (out, *back(jnp.ones_like(out))):
    assert np.isfinite(x).all()


def test_tiles_are_taken_for_many_scores_on_a_cpu():
  def program(queries):
    sizes = dict(rows=2, heads=4, queries=queries, keys=1025)
    return attention.attender(None, **sizes).func

  assert program(1025) is attention.attend_in_tiles
  assert program(1) is attention.attend
  mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
  with jax.set_mesh(mesh):  # XLA splits the program.
    assert program(1025) is attention.attend


def on_h100():
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh(
      (1,),
      ("x",),
      axis_types=(jax.sharding.AxisType.Auto,),
      abstract_device=jax.sharding.AbstractDevice(
        "NVIDIA H100 80GB HBM3", None, "gpu"
      ),
    )
  )


def test_a_gpu_takes_the_library_for_many_scores():
  sizes = dict(heads=16, queries=1024, keys=1024)
  with on_h100():
    few = attention.attender(None, rows=1, heads=4, queries=64, keys=64)
    many = attention.attender(None, rows=1, **sizes)
  assert few.func is attention.attend
  assert many.func is attention.attend_by_library
  assert attention.attender(None, rows=1, **sizes).func is not many.func


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [6, 7])
def test_the_library_gets_even_lengths_and_the_same_mask(
  masked, length, monkeypatch
):
  library, seen = jax.nn.dot_product_attention, []

  def stand_in(q, k, v, *, implementation, **options):
    seen.append((implementation, q.shape[1], k.shape[1]))
    return library(q, k, v, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  q, k, v = (
    jax.random.normal(jax.random.key(i), (2, length, heads, 8))
    for i, heads in enumerate((4, 2, 2))
  )
  visible = None
  if masked:
    segments = jnp.ones((2, length), jnp.int32).at[:, 3:].set(2)
    index = jnp.broadcast_to(jnp.arange(length), (2, length))
    visible = attention.Visible(index, segments, segments)
  mask = None if visible is None else attention.attention_mask(*visible)

  def of(attend):
    def total(*x):
      return jnp.sum(jnp.sin(attend(*x)))

    return attend(q, k, v), jax.grad(total, (0, 1, 2))(q, k, v)

  found = of(lambda *x: attention.attend_by_library(*x, visible))
  expected = of(lambda *x: attention.attend(*x, mask))
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  assert set(seen) == {("cudnn", length + length % 2, length + length % 2)}


def test_what_the_library_refuses_is_said_once(caplog):
  attention._say_once.cache_clear()
  q = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
  for _ in range(2):
    out = attention.attend_by_library(q, q, q)
  np.testing.assert_array_equal(out, attention.attend(q, q, q))
  assert caplog.text.count("cuDNN refuses") == 1
