"""The vision tower: positions, layer choice, drop path, pixel shuffle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.model_config import VisionConfig
from argenseg_jax.models.vit import (
  VisionEncoder,
  VisionLayer,
  VisionTower,
  pixel_shuffle,
)

CONFIG = VisionConfig(
  image_side=16,
  patch_side=4,
  width=8,
  num_layers=3,
  num_heads=2,
  mlp_width=16,
  layer_scale_init=1.0,
)


def build(cls, config, *args):
  """A module with random parameters, without compiling its initializers."""
  made = construct.abstract(lambda: cls(config, *args, rngs=construct.Rngs(0)))
  graph, state = nnx.split(made)
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), state
  )
  return nnx.merge(graph, state)


@pytest.fixture(scope="module")
def tower():
  return build(VisionTower, CONFIG)


@pytest.fixture(scope="module")
def images():
  return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def test_first_hidden_state_is_class_token_then_raster_patches(tower, images):
  hidden = tower(images, num_layers=0)
  kernel = tower.patch_embedding.kernel[...]
  patch = images[1, 4:8, 8:12]  # Row 1, column 2 of 4 x 4 patches.
  want = jnp.einsum("ijc,ijcd->d", patch, kernel)
  want = want + tower.patch_embedding.bias[...]
  positions = tower.position_embedding[...]
  np.testing.assert_allclose(
    hidden[1, 1 + 6], want + positions[1 + 6], rtol=1e-4, atol=1e-5
  )
  token = tower.class_embedding[...] + positions[0]
  np.testing.assert_allclose(hidden[:, 0], jnp.stack((token, token)))


def test_layers_are_applied_in_order(tower, images):
  x = tower(images, num_layers=0)
  graph, state = nnx.split(tower.layers)
  for i in range(3):
    layer = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], state))
    x = layer(x)
    np.testing.assert_allclose(
      tower(images, num_layers=i + 1), x, rtol=1e-4, atol=1e-5
    )
  np.testing.assert_allclose(tower(images), x, rtol=1e-4, atol=1e-5)


def slow_norm(x, scale, bias=None):
  if bias is None:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale + bias


def slow_layer(layer, x):
  """One sample [t d] through an RMS-norm layer with joint qk-norm, by heads."""
  p = {
    ".".join(map(str, path)): np.asarray(leaf[...], np.float64)
    for path, leaf in nnx.to_flat_state(nnx.state(layer))
  }
  erf = np.vectorize(lambda v: float(jax.lax.erf(jnp.float32(v))))
  y = slow_norm(x, p["norm_1.scale"]) @ p["qkv.kernel"]
  d = x.shape[1]
  q = slow_norm(y[:, :d], p["query_norm.scale"])
  k = slow_norm(y[:, d : 2 * d], p["key_norm.scale"])
  v = y[:, 2 * d :]
  heads = []
  for h in range(2):
    part = slice(h * d // 2, (h + 1) * d // 2)
    scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(d / 2))
    heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
  y = np.concatenate(heads, -1) @ p["out.kernel"] + p["out.bias"]
  x = x + y * p["scale_1"]
  y = slow_norm(x, p["norm_2.scale"]) @ p["up.kernel"] + p["up.bias"]
  y = y * 0.5 * (1 + erf(y / np.sqrt(2)))
  return x + (y @ p["down.kernel"] + p["down.bias"]) * p["scale_2"]


def test_layer_with_joint_qk_norm_agrees_with_loops():
  config = dataclasses.replace(
    CONFIG, norm="rms_norm", qk_norm=True, qkv_bias=False
  )
  layer = build(VisionLayer, config)
  x = jax.random.normal(jax.random.key(2), (2, 5, 8))
  y = layer(x)
  for row in range(2):
    np.testing.assert_allclose(
      y[row], slow_layer(layer, np.asarray(x[row], np.float64)), atol=1e-4
    )


def test_positions_are_resampled_bicubically(tower):
  grid = tower.position_embedding[...][1:]
  np.testing.assert_array_equal(tower.positions(4), grid)
  method = jax.image.ResizeMethod.CUBIC_PYTORCH
  for side in (2, 3, 6, 7):
    want = jax.image.resize(
      grid.reshape(4, 4, 8), (side, side, 8), method, antialias=False
    )
    np.testing.assert_allclose(
      tower.positions(side), want.reshape(-1, 8), atol=1e-5
    )
  assert tower(jnp.zeros((1, 24, 24, 3))).shape == (1, 37, 8)


def test_recomputing_activations_changes_nothing(tower, images):
  graph, state = nnx.split(tower)

  def loss(state, remat_policy):
    hidden = nnx.merge(graph, state)(images, remat_policy=remat_policy)
    return jnp.sum(hidden**2)

  kept = jax.grad(loss)(state, False)
  again = jax.grad(loss)(state, None)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    kept,
    again,
  )


def test_drop_path_drops_whole_samples(images):
  tower = build(VisionTower, dataclasses.replace(CONFIG, drop_path=0.5))
  np.testing.assert_array_equal(tower.drop_rates, [0, 0.25, 0.5])
  plain = build(VisionTower, CONFIG)
  np.testing.assert_array_equal(tower(images), plain(images))

  noise = jax.random.uniform(jax.random.key(3), (512, 2, len(images)))
  # The first layer's rate is 0; the second's 0.25 drops whole samples.
  np.testing.assert_array_equal(
    tower(images, num_layers=1, drop_path=jnp.full((len(images), 3, 2), 0.99)),
    tower(images, num_layers=1),
  )
  graph, state = nnx.split(tower.layers)
  second = nnx.merge(graph, jax.tree.map(lambda p: p[1], state))
  x = tower(images, num_layers=1)

  def drop(noise):
    return second(x, (jnp.float32(0.25), noise))

  outputs = jax.vmap(drop)(noise)
  untouched = (outputs == x).all((2, 3)).mean()
  assert 0.03 < untouched < 0.1  # Both branches dropped: 1 / 16.


def test_drop_path_branches_are_rescaled():
  config = dataclasses.replace(CONFIG, mlp_width=4)
  layer = build(VisionLayer, config)
  layer.scale_2[...] = jnp.zeros(8)
  x = jax.random.normal(jax.random.key(4), (64, 3, 8))
  full = layer(x) - x
  dropped = (
    layer(x, (jnp.float32(0.5), jax.random.uniform(jax.random.key(5), (2, 64))))
    - x
  )
  kept = jnp.abs(dropped).max((1, 2)) > 0
  assert 10 < kept.sum() < 54
  np.testing.assert_allclose(dropped[kept], 2 * full[kept], atol=1e-5)


def test_pixel_shuffle_order():
  grid = jnp.arange(32.0).reshape(1, 4, 4, 2)
  merged = pixel_shuffle(grid, 2)
  assert merged.shape == (1, 2, 2, 8)
  for i, j in np.ndindex(2, 2):
    cells = [grid[0, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)]
    np.testing.assert_array_equal(merged[0, i, j], jnp.concatenate(cells))
  np.testing.assert_array_equal(
    pixel_shuffle(grid, 2, transposed=True), merged.swapaxes(1, 2)
  )
  np.testing.assert_array_equal(pixel_shuffle(grid, 1), grid)


@pytest.mark.parametrize(
  ("select_layer", "count"), [(-1, 3), (3, 3), (-2, 2), (1, 1), (0, 0), (-4, 0)]
)
def test_select_layer_counts_the_embeddings_first(select_layer, count, images):
  config = dataclasses.replace(CONFIG, select_layer=select_layer)
  encoder = build(VisionEncoder, config, 6)
  patches = encoder.tower(images, num_layers=count)[:, 1:]
  merged = pixel_shuffle(patches.reshape(2, 4, 4, 8), 2).reshape(2, 4, 32)
  np.testing.assert_allclose(
    encoder(images), encoder.connector(merged), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("num_layers", [0, 1])
def test_conv_stem_reaches_the_same_grid(num_layers):
  config = dataclasses.replace(
    CONFIG, stem="conv", num_layers=num_layers, pixel_shuffle=1
  )
  encoder = build(VisionEncoder, config, 6)
  widths = [c.kernel.shape[-1] for c in encoder.tower.patch_embedding.convs]
  assert widths == [4, 8]
  images = jax.random.normal(jax.random.key(6), (2, 16, 16, 3))
  assert encoder(images).shape == (2, config.num_embeddings, 6)
  # A pixel in the top left corner reaches no patch far from it.
  moved = encoder(images.at[:, 0, 0].add(1.0)) != encoder(images)
  assert moved[:, 0].any()
  if num_layers == 0:
    assert not moved[:, 5:].any()


def test_stem_blocks_look_further():
  """The gradient of one embedding reaches one more patch a block."""
  reach = []
  for blocks in (0, 1, 2):
    config = dataclasses.replace(
      CONFIG, stem="conv", stem_blocks=blocks, num_layers=0, pixel_shuffle=1
    )
    stem = build(VisionTower, config).patch_embedding
    side = config.image_side
    grads = jax.grad(lambda x, stem=stem: jnp.sum(stem(x)[0, 0, 0]))(
      jnp.ones((1, side, side, 3))
    )
    reach.append(int(jnp.sum(jnp.any(grads[0] != 0, (1, 2)))))
  patch = CONFIG.patch_side
  assert reach[1] - reach[0] == patch
  assert reach[2] - reach[1] == patch


def test_every_parameter_names_its_axes():
  encoder = build(VisionEncoder, CONFIG, 6)
  for path, leaf in nnx.to_flat_state(nnx.state(encoder, nnx.Param)):
    axes = leaf.get_metadata("axes")
    assert len(axes) == leaf.ndim, path
    assert (axes[0] == "layers") == ("layers" in path), path


def test_initializes_finite_and_scaled():
  encoder = VisionEncoder(CONFIG, 6, rngs=construct.Rngs(0))
  np.testing.assert_array_equal(encoder.tower.layers.scale_1[...], 1.0)
  assert encoder.tower.layers.qkv.kernel.shape == (3, 8, 24)
  rows = encoder.tower.layers.qkv.kernel[...]
  assert jnp.abs(rows[0] - rows[1]).max() > 0.1


def test_bfloat16_activations():
  tower = build(
    lambda c, rngs: VisionTower(c, rngs=rngs, dtype=jnp.bfloat16), CONFIG
  )
  hidden = tower(jnp.ones((1, 16, 16, 3)))
  assert hidden.dtype == jnp.bfloat16
  assert tower.layers.qkv.kernel.dtype == jnp.float32


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"image_side": 18}, r"vision\.image_side 18"),
    ({"num_heads": 3}, r"vision\.num_heads 3"),
    ({"pixel_shuffle": 3}, r"vision\.pixel_shuffle is 3"),
    ({"select_layer": 4}, r"vision\.select_layer is 4"),
    (
      {"stem": "conv", "patch_side": 6, "image_side": 24},
      r"vision\.patch_side 6",
    ),
  ],
)
def test_impossible_configs_name_the_key(changes, message):
  with pytest.raises(ValueError, match=message):
    VisionEncoder(
      dataclasses.replace(CONFIG, **changes), 6, rngs=construct.Rngs(0)
    )


def test_images_that_do_not_fit_are_named(tower):
  with pytest.raises(ValueError, match="16 x 20 pixels"):
    tower(jnp.zeros((1, 16, 20, 3)))
