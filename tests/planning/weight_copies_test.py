"""A pass of the decoder writes nothing as large as a weight, on a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.model_config import LLMConfig
from argenseg_jax.models import int8, layers
from argenseg_jax.models.llm import Decoder, KVCache
from argenseg_jax.planning import topology
from argenseg_jax.tools import compile_kernels

CONFIG = LLMConfig(
  vocab_size=64,
  width=1024,
  num_layers=3,
  num_heads=8,
  num_kv_heads=4,
  head_dim=128,
  mlp_width=4096,
)
_BYTES = {"bf16": 2, "f32": 4, "s8": 1}
_FREE = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant")


def written(text: str) -> int:
  """Bytes of the largest array that an instruction of a program writes."""
  largest = 0
  for line in text.splitlines():
    match = re.match(r"\s+(?:ROOT )?%?\S+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
    if not match or match[2] in _FREE:
      continue
    for dtype, sides in re.findall(r"\b(\w+)\[([\d,]+)\]", match[1]):
      if dtype in _BYTES:
        size = np.prod([int(side) for side in sides.split(",")])
        largest = max(largest, int(size) * _BYTES[dtype])
  return largest


def entry_of(text: str) -> str:
  """The instructions that a device runs: fused ones write nothing."""
  start = text.index("\nENTRY")
  bodies = re.findall(r"\n%?[\w.\-]*body[\w.\-]* .*?\n}", text, re.S)
  return text[start:] + "".join(bodies)


def one_pass(*, apart: bool, weights: str, tokens: int) -> str:
  """HLO of a pass over a small cache, compiled for an H100."""

  def make():
    types = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    llm = Decoder(CONFIG, rngs=construct.Rngs(0), **types)
    if weights:
      int8.quantize(llm, weights)
    if apart:
      llm.layers = layers.unstack(llm.layers)
    return llm

  graph, state = nnx.split(construct.abstract(make))
  leaves, tree = jax.tree.flatten(state)

  def run(x, *leaves):
    llm = nnx.merge(graph, tree.unflatten(leaves))
    hidden, _ = llm.extend(
      x,
      KVCache.empty(CONFIG, 1, 64, jnp.bfloat16),
      positions=jnp.arange(tokens)[None],
      valid=jnp.ones((1, tokens), bool),
    )
    return hidden

  x = jax.ShapeDtypeStruct((1, tokens, CONFIG.width), jnp.bfloat16)
  return compile_kernels.compile_for("h100", run, (x, *leaves)).as_text()


def test_what_is_written_is_counted():
  text = """
ENTRY %main (p: bf16[4,4]) -> bf16[4,4] {
  %p = bf16[4,4]{1,0} parameter(0)
  %copy.1 = (f32[2,3]{1,0}, bf16[4,4]{1,0}) fusion(%p), kind=kLoop
  ROOT %b = bf16[64]{0} bitcast(%copy.1)
}"""
  assert written(entry_of(text)) == 32


@pytest.mark.skipif(
  not topology.has_compiler("gpu"), reason="no CUDA plugin is installed"
)
@pytest.mark.parametrize("weights", ["", "int8"])
def test_layers_apart_are_read_where_they_are(weights):
  matrix = CONFIG.width * CONFIG.mlp_width * (1 if weights else 2)
  apart = one_pass(apart=True, weights=weights, tokens=16)
  assert written(entry_of(apart)) < matrix / 2
  if not weights:  # The test sees a copy where there is one.
    stacked = one_pass(apart=False, weights=weights, tokens=16)
    assert written(entry_of(stacked)) >= matrix
