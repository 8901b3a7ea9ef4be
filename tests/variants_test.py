"""Named sizes resolve without memory; 8B has 8.22 billion parameters."""

import jax
import pytest
from flax import nnx

from argenseg_jax import construct, variants
from argenseg_jax.models.argenseg import ARGenSeg

BILLIONS = {
  "tiny": (0.0005, 0.002),
  "bench": (0.03, 0.08),
  "argenseg_1b": (0.9, 1.2),
  "argenseg_2b": (2.2, 2.6),
  "argenseg_4b": (3.6, 4.4),
  "argenseg_8b": (8.215, 8.225),
  "argenseg_8b_512": (8.215, 8.235),
  "argenseg_v3_1b": (1.03, 1.08),
  "argenseg_v3_2b": (2.17, 2.26),
  "argenseg_v3_8b": (7.92, 8.25),
  "argenseg_v3_14b": (14.97, 15.58),
  "argenseg_v35_1b": (1.15, 1.20),
  "argenseg_v35_2b": (2.42, 2.52),
  "argenseg_v35_4b": (4.77, 4.96),
  "argenseg_v35_8b": (8.50, 8.85),
  "argenseg_v35_14b": (14.97, 15.58),
}


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_size(name):
  config = variants.get(name)
  model = construct.abstract(lambda: ARGenSeg(config, rngs=construct.Rngs(0)))
  sizes = jax.tree.leaves(
    jax.tree.map(lambda x: x.size, nnx.state(model, nnx.Param))
  )
  low, high = BILLIONS[name]
  assert low <= sum(sizes) / 1e9 <= high


def test_vocabulary_of_argenseg_8b():
  ids = variants.get("argenseg_8b").token_ids
  assert (ids.mask, ids.ge_start, ids.ge_end) == (92553, 92554, 92555)
  assert (ids.mask_context, ids.first_code) == (92556, 92557)
  assert ids.img_context == 92546
  assert variants.get("argenseg_8b").llm.vocab_size == 96653
