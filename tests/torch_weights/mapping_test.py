"""The rule tables: both ways, byte by byte, and the released 8B model."""

import json
import pathlib

import numpy as np
import pytest
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.llm import Decoder
from argenseg_jax.models.vit import VisionEncoder
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.torch_weights import (
  families,
  mapping,
  recognize,
  rules,
  tensors,
)

MANIFEST = pathlib.Path(__file__).parents[1] / "golden/argenseg_8b.json"


def _families(tiny):
  for name, config in tiny.LLMS.items():
    make = lambda c=config: Decoder(c, rngs=construct.Rngs(0))  # noqa: E731
    yield name, families.table(config), make
  for name, config in tiny.VISIONS.items():
    make = lambda c=config: VisionEncoder(c, 16, rngs=construct.Rngs(0))  # noqa: E731
    yield name, rules.internvit(config), make
  config = tiny.VQVAE
  make = lambda: VQVAE(config, rngs=construct.Rngs(0))  # noqa: E731
  yield "vqvae", rules.vqvae(config), make


FAMILIES = (
  "internlm2",
  "internlm2_bias",
  "qwen2",
  "qwen2_tied",
  "qwen3",
  "layer_norm",
  "rms_norm",
  "vqvae",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_identical(family, tiny, mesh):
  table, make = {n: (t, m) for n, t, m in _families(tiny)}[family]
  state = tiny.abstract(make)
  source = tiny.random_source(table, state)
  kept = mapping.check(table, mapping.variables(state), source, "x")
  assert kept == [c.torch for c in table.carried]
  state, odd = mapping.load(table, state, source, mesh)
  assert not odd
  leaves = {p: v.get_value() for p, v in mapping.variables(state).items()}
  back = mapping.Exported(table, leaves, carried=source)
  assert back.tensors == source.tensors
  for name in source.tensors:
    np.testing.assert_array_equal(back.read(name), source.read(name))


def test_mixed_dtypes_of_a_stack_come_back(tiny, mesh):
  config = tiny.LLMS["qwen2"]
  table = families.table(config)
  state = tiny.abstract(lambda: Decoder(config, rngs=construct.Rngs(0)))
  source = tiny.random_source(table, state)
  name = "model.layers.1.mlp.up_proj.weight"
  half = source.read(name).astype(np.float16)
  info = tensors.TensorInfo(half.shape, half.dtype)
  mixed = tensors.Merged(source, tensors.Computed({name: (info, lambda: half)}))
  state, odd = mapping.load(table, state, mixed, mesh)
  assert odd == {name: "float16"}
  leaves = {p: v.get_value() for p, v in mapping.variables(state).items()}
  back = mapping.Exported(table, leaves, dtypes=odd).read(name)
  assert back.dtype == np.float16
  np.testing.assert_array_equal(back, half)


def test_wqkv_is_grouped_by_key_value_head(tiny):
  config = tiny.LLMS["internlm2"]  # Two queries to each of two kv heads.
  table = families.table(config)
  (rule,) = (r for r in table.rules if r.torch.endswith("wqkv.weight"))
  rows = np.arange(32)[:, None] + np.zeros((1, 16))
  query, key, value = rule.transform.to_ours(rows)
  np.testing.assert_array_equal(query[0], [*range(8), *range(16, 24)])
  np.testing.assert_array_equal(key[0], [*range(8, 12), *range(24, 28)])
  np.testing.assert_array_equal(value[0], [*range(12, 16), *range(28, 32)])


def test_every_tensor_of_argenseg_8b_has_its_place():
  manifest = json.loads(MANIFEST.read_text())
  shapes = {n: tuple(s) for n, s in manifest["tensors"].items()}
  assert len(shapes) == 901
  source = tensors.Computed(
    {
      n: (tensors.TensorInfo(s, np.dtype(np.float32)), lambda: None)
      for n, s in shapes.items()
    }
  )
  values = manifest["config"] | {"set": "manifest"}
  config = recognize.whole_config(values, source, None)
  assert config.token_ids.first_code == 92557
  state = nnx.state(
    construct.abstract(lambda: ARGenSeg(config, rngs=construct.Rngs(0)))
  )
  table, leaves = rules.argenseg(config), mapping.variables(state)
  kept = mapping.check(table, leaves, source, "manifest")
  assert kept == ["image_tokenizer.quantize.ema_vocab_hit_SV"]
  assert (
    mapping.torch_shapes(table, leaves) | {kept[0]: shapes[kept[0]]} == shapes
  )
  total = sum(int(np.prod(shape)) for shape in shapes.values())
  assert round(total / 1e9, 2) == 8.22
  ours = sum(
    int(np.prod(leaf.shape))
    for path, leaf in leaves.items()
    if not path.endswith(mapping.OURS_ONLY)
  )
  assert ours == total - int(np.prod(shapes[kept[0]]))
