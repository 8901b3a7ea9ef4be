"""Families of language models: their tensors' names, and their config.json.

A new family is a record in `FAMILIES` and its name in `LLMConfig.family`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from argenseg_jax.model_config import LLMConfig
from argenseg_jax.torch_weights.tables import (
  SAME,
  Rule,
  Table,
  Transform,
  linear,
  norm,
)


@dataclasses.dataclass(frozen=True)
class Family:
  """What tells one family from another.

  Attributes:
    architecture: class of the language model in `config.json`.
    model_type: likewise.
    table: names of its tensors.
    token_ids: text -> id in the released vocabularies, for folders without a
      text tokenizer.
    pad_id: where `config.json` has none.
    switches: of its `config.json`, keys of `LLMConfig`.
    values: of an `LLMConfig`, the keys of `config.json` that only this family
      has.
    misfits: keys of `LLMConfig` -> whether this family cannot have their value.
  """

  architecture: str
  model_type: str
  table: Callable[[LLMConfig], Table]
  token_ids: Mapping[str, int]
  pad_id: int | None
  switches: Callable[[Mapping[str, Any]], dict[str, Any]]
  values: Callable[[LLMConfig], dict[str, Any]]
  misfits: Callable[[LLMConfig], dict[str, bool]]


def _grouped_qkv(config: LLMConfig) -> Transform:
  """InternLM2's `wqkv`: per key-value head, the queries of its group, then
  key, then value; along the first axis of kernel [out in] and bias [out]."""
  kv, hd = config.num_kv_heads, config.head_dim
  queries = config.num_heads // kv

  def to_ours(x):
    groups = x.reshape(kv, queries + 2, hd, *x.shape[1:])
    q = groups[:, :queries].reshape(-1, *x.shape[1:])
    k = groups[:, -2].reshape(-1, *x.shape[1:])
    v = groups[:, -1].reshape(-1, *x.shape[1:])
    return q.T, k.T, v.T

  def to_torch(qkv):
    parts = [
      x.T.reshape(kv, n, hd, *x.shape[:-1])
      for x, n in zip(qkv, (queries, 1, 1), strict=True)
    ]
    rows = (queries + 2) * kv * hd
    return np.concatenate(parts, 1).reshape(rows, *qkv[0].shape[:-1])

  return Transform(to_ours, to_torch)


def _internlm2(config: LLMConfig) -> Table:
  """`InternLM2ForCausalLM` <-> `models.llm.Decoder`."""
  n = config.num_layers
  block, ours = "model.layers.{}.", "layers."
  heads = tuple(f"{ours}attention.{p}" for p in ("query", "key", "value"))
  grouped = _grouped_qkv(config)
  rules = [
    Rule("model.tok_embeddings.weight", ("embedding",), SAME),
    Rule(
      f"{block}attention.wqkv.weight",
      tuple(f"{h}.kernel" for h in heads),
      grouped,
      n,
    ),
    *linear(f"{block}attention.wo", f"{ours}attention.out", config.out_bias, n),
    *linear(f"{block}feed_forward.w1", f"{ours}mlp.gate", False, n),
    *linear(f"{block}feed_forward.w3", f"{ours}mlp.up", False, n),
    *linear(f"{block}feed_forward.w2", f"{ours}mlp.down", False, n),
    *norm(f"{block}attention_norm", f"{ours}attention_norm", False, n),
    *norm(f"{block}ffn_norm", f"{ours}mlp_norm", False, n),
    *norm("model.norm", "norm", False),
  ]
  if config.qkv_bias:
    rules.append(
      Rule(
        f"{block}attention.wqkv.bias",
        tuple(f"{h}.bias" for h in heads),
        grouped,
        n,
      )
    )
  if not config.tied_head:
    rules.append(Rule("output.weight", ("untied_head",), SAME))
  return Table(tuple(rules))


def _qwen(config: LLMConfig) -> Table:
  """Qwen2 and Qwen3 <-> `models.llm.Decoder`."""
  n, bias = config.num_layers, config.qkv_bias
  block, ours = "model.layers.{}.", "layers."
  attn, mlp = f"{block}self_attn", f"{block}mlp"
  rules = [
    Rule("model.embed_tokens.weight", ("embedding",), SAME),
    *linear(f"{attn}.q_proj", f"{ours}attention.query", bias, n),
    *linear(f"{attn}.k_proj", f"{ours}attention.key", bias, n),
    *linear(f"{attn}.v_proj", f"{ours}attention.value", bias, n),
    *linear(f"{attn}.o_proj", f"{ours}attention.out", config.out_bias, n),
    *linear(f"{mlp}.gate_proj", f"{ours}mlp.gate", False, n),
    *linear(f"{mlp}.up_proj", f"{ours}mlp.up", False, n),
    *linear(f"{mlp}.down_proj", f"{ours}mlp.down", False, n),
    *norm(f"{block}input_layernorm", f"{ours}attention_norm", False, n),
    *norm(f"{block}post_attention_layernorm", f"{ours}mlp_norm", False, n),
    *norm("model.norm", "norm", False),
  ]
  if config.qk_norm:
    rules += norm(f"{attn}.q_norm", f"{ours}attention.query_norm", False, n)
    rules += norm(f"{attn}.k_norm", f"{ours}attention.key_norm", False, n)
  if not config.tied_head:
    rules.append(Rule("lm_head.weight", ("untied_head",), SAME))
  return Table(tuple(rules))


def _odd_heads(config: LLMConfig) -> bool:
  return config.head_dim * config.num_heads != config.width


def _qwen_ids(first_special: int) -> dict[str, int]:
  """InternVL's tokens stand side by side behind Qwen's."""
  ids = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
  ours = ("<img>", "</img>", "<IMG_CONTEXT>")
  return ids | {text: first_special + i for i, text in enumerate(ours)}


FAMILIES = {
  "internlm2": Family(
    architecture="InternLM2ForCausalLM",
    model_type="internlm2",
    table=_internlm2,
    token_ids={
      "</s>": 2,
      "<s>": 1,
      "<|im_start|>": 92543,
      "<|im_end|>": 92542,
      "<img>": 92544,
      "</img>": 92545,
      "<IMG_CONTEXT>": 92546,
    },
    pad_id=2,
    switches=lambda values: dict.fromkeys(
      ("qkv_bias", "out_bias"), bool(values.get("bias", False))
    ),
    values=lambda config: {"bias": config.out_bias},
    misfits=lambda config: {
      "head_dim": _odd_heads(config),
      "qk_norm": config.qk_norm,
      "qkv_bias": config.qkv_bias != config.out_bias,
    },
  ),
  "qwen2": Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    table=_qwen,
    token_ids=_qwen_ids(151665),
    pad_id=None,
    switches=lambda values: {"qkv_bias": True},
    values=lambda config: (
      {"head_dim": config.head_dim} if _odd_heads(config) else {}
    ),
    misfits=lambda config: {
      "qk_norm": config.qk_norm,
      "qkv_bias": not config.qkv_bias,
      "out_bias": config.out_bias,
    },
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    table=_qwen,
    token_ids=_qwen_ids(151669),
    pad_id=None,
    switches=lambda values: {
      "head_dim": values.get("head_dim") or 128,
      "qk_norm": True,
    }
    | dict.fromkeys(
      ("qkv_bias", "out_bias"), bool(values.get("attention_bias", False))
    ),
    values=lambda config: {
      "attention_bias": config.out_bias,
      "head_dim": config.head_dim,
    },
    misfits=lambda config: {
      "qk_norm": not config.qk_norm,
      "qkv_bias": config.qkv_bias != config.out_bias,
    },
  ),
}


def of(config: LLMConfig) -> Family:
  """The family of a decoder."""
  return FAMILIES[config.family]


def table(config: LLMConfig) -> Table:
  """The decoder's tensors, in the naming of its family."""
  return of(config).table(config)
