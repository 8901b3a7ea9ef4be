"""Adapters of a fused module: the same update of the weights both ways."""

import pathlib

import numpy as np
import pytest

from argenseg_jax.torch_weights import families, peft_tensors
from argenseg_jax.torch_weights.tensors import WeightsError


@pytest.fixture
def wqkv(tiny):
  (rule,) = (
    rule
    for rule in families.table(tiny.LLMS["internlm2"]).rules
    if rule.torch.endswith("wqkv.weight")
  )
  return rule


def _pairs(*ranks, shared=False):
  """A [16 r] and B [r out] of query, key and value; None for rank 0."""
  rng = np.random.default_rng(0)
  first = rng.normal(size=(16, max(ranks))).astype(np.float32)
  pairs = []
  for rank, width in zip(ranks, (16, 8, 8), strict=True):
    a = first if shared else rng.normal(size=(16, rank)).astype(np.float32)
    b = rng.normal(size=(rank, width)).astype(np.float32)
    pairs.append((a, b) if rank else None)
  return pairs


@pytest.mark.parametrize(
  ("pairs", "rank"),
  [
    (_pairs(3, 3, 3), 9),
    (_pairs(3, 3, 3, shared=True), 3),
    (_pairs(2, 0, 2), 4),
    (_pairs(2, 1, 0), 3),
  ],
)
def test_wqkv_gets_the_updates_of_query_key_and_value(wqkv, pairs, rank):
  a, b = peft_tensors.module_tensors(wqkv, pairs)
  assert a.shape == (rank, 16)
  assert b.shape == (32, rank)
  updates = [
    np.zeros((16, width), np.float32) if pair is None else pair[0] @ pair[1]
    for pair, width in zip(pairs, (16, 8, 8), strict=True)
  ]
  wanted = wqkv.transform.to_torch(tuple(updates))
  np.testing.assert_allclose(b @ a, wanted, atol=1e-5)
  # And back: each projection gets the same update from the fused module.
  found = peft_tensors._projections(
    wqkv, [a, a], [b, b], (rank, 1.0), pathlib.Path("x")
  )
  for entry, update in zip(found, updates, strict=True):
    assert entry.path.startswith("layers.attention.")
    np.testing.assert_allclose(entry.a[1] @ entry.b[1], update, atol=1e-5)


def test_a_fused_module_without_known_widths_is_refused(wqkv):
  pairs = _pairs(0, 2, 2)
  with pytest.raises(WeightsError, match="adapt all of them"):
    peft_tensors.module_tensors(wqkv, pairs)


def test_unequal_ranks_and_scalings_become_one(wqkv):
  found = [
    peft_tensors.Found("p.a", 2.0, np.ones((4, 1)), np.ones((1, 3))),
    peft_tensors.Found("p.b", 2.0, np.ones((4, 3)), np.ones((3, 3))),
    peft_tensors.Found("p.c", 0.5, np.ones((4, 2)), np.ones((2, 3))),
  ]
  config, arrays = peft_tensors.with_one_rank(found)
  assert (config.rank, config.alpha) == (3, 6.0)
  assert config.targets == ("p.a", "p.b", "p.c")
  for entry in found:
    a, b = arrays[f"{entry.path}.lora_a"], arrays[f"{entry.path}.lora_b"]
    assert a.shape == (4, 3)
    np.testing.assert_allclose(
      config.alpha / config.rank * (a @ b), entry.scaling * entry.a @ entry.b
    )
