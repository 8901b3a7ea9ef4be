"""One table per family: PyTorch name <-> path of our variable, both ways.

PyTorch keeps linear kernels as [out in] and convolutions as [out in h w], ours
are [in out] and [h w in out]; layers that we stack carry a leading axis.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from argenseg_jax.config import (
  LLMConfig,
  ModelConfig,
  VisionConfig,
  VQVAEConfig,
)

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one PyTorch tensor becomes one or more of our arrays, and back."""

  to_ours: Callable[[np.ndarray], Arrays]
  to_torch: Callable[[Arrays], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a table.

  Attributes:
    torch: PyTorch name; "{}" stands for the index within `stack`.
    ours: paths of our variables.
    transform: for one tensor.
    stack: 0, or how many tensors form the leading axis of `ours`.
  """

  torch: str
  ours: tuple[str, ...]
  transform: Transform
  stack: int = 0

  def names(self) -> list[str]:
    """PyTorch names of the rule, in the order of the stack."""
    if not self.stack:
      return [self.torch]
    return [self.torch.format(i) for i in range(self.stack)]


@dataclasses.dataclass(frozen=True)
class Carried:
  """A tensor of the authors' modules that computes nothing.

  Import keeps it beside the checkpoint; export writes it back, or zeros of
  `shape` where none was kept.
  """

  torch: str
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Table:
  rules: tuple[Rule, ...]
  carried: tuple[Carried, ...] = ()

  def prefixed(self, torch: str, ours: str = "") -> "Table":
    """The same table for a module inside another."""
    rules = (
      dataclasses.replace(
        rule, torch=torch + rule.torch, ours=tuple(ours + p for p in rule.ours)
      )
      for rule in self.rules
    )
    carried = (
      dataclasses.replace(c, torch=torch + c.torch) for c in self.carried
    )
    return Table(tuple(rules), tuple(carried))

  def __add__(self, other: "Table") -> "Table":
    return Table(self.rules + other.rules, self.carried + other.carried)


def _one(to_ours, to_torch=None) -> Transform:
  """A transform of one array; its own inverse by default."""
  back = to_torch or to_ours
  return Transform(lambda x: (to_ours(x),), lambda xs: back(xs[0]))


SAME = _one(lambda x: x)
LINEAR = _one(lambda x: x.T)
CONV = _one(
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
# [1 n d] and [1 1 d] to [n d] and [d].
BATCHED = _one(lambda x: x[0], lambda x: x[None])
TWICE_BATCHED = _one(lambda x: x[0, 0], lambda x: x[None, None])


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


def _linear(
  torch: str, ours: str, bias: bool, stack: int = 0
) -> Iterator[Rule]:
  yield Rule(f"{torch}.weight", (f"{ours}.kernel",), LINEAR, stack)
  if bias:
    yield Rule(f"{torch}.bias", (f"{ours}.bias",), SAME, stack)


def _conv(torch: str, ours: str) -> Iterator[Rule]:
  yield Rule(f"{torch}.weight", (f"{ours}.kernel",), CONV)
  yield Rule(f"{torch}.bias", (f"{ours}.bias",), SAME)


def _norm(torch: str, ours: str, bias: bool, stack: int = 0) -> Iterator[Rule]:
  yield Rule(f"{torch}.weight", (f"{ours}.scale",), SAME, stack)
  if bias:
    yield Rule(f"{torch}.bias", (f"{ours}.bias",), SAME, stack)


def internlm2(config: LLMConfig) -> Table:
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
    *_linear(
      f"{block}attention.wo", f"{ours}attention.out", config.out_bias, n
    ),
    *_linear(f"{block}feed_forward.w1", f"{ours}mlp.gate", False, n),
    *_linear(f"{block}feed_forward.w3", f"{ours}mlp.up", False, n),
    *_linear(f"{block}feed_forward.w2", f"{ours}mlp.down", False, n),
    *_norm(f"{block}attention_norm", f"{ours}attention_norm", False, n),
    *_norm(f"{block}ffn_norm", f"{ours}mlp_norm", False, n),
    *_norm("model.norm", "norm", False),
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


def qwen2(config: LLMConfig) -> Table:
  """`Qwen2ForCausalLM` (and Qwen3 with `qk_norm`) <-> `models.llm.Decoder`."""
  n, bias = config.num_layers, config.qkv_bias
  block, ours = "model.layers.{}.", "layers."
  attn, mlp = f"{block}self_attn", f"{block}mlp"
  rules = [
    Rule("model.embed_tokens.weight", ("embedding",), SAME),
    *_linear(f"{attn}.q_proj", f"{ours}attention.query", bias, n),
    *_linear(f"{attn}.k_proj", f"{ours}attention.key", bias, n),
    *_linear(f"{attn}.v_proj", f"{ours}attention.value", bias, n),
    *_linear(f"{attn}.o_proj", f"{ours}attention.out", config.out_bias, n),
    *_linear(f"{mlp}.gate_proj", f"{ours}mlp.gate", False, n),
    *_linear(f"{mlp}.up_proj", f"{ours}mlp.up", False, n),
    *_linear(f"{mlp}.down_proj", f"{ours}mlp.down", False, n),
    *_norm(f"{block}input_layernorm", f"{ours}attention_norm", False, n),
    *_norm(f"{block}post_attention_layernorm", f"{ours}mlp_norm", False, n),
    *_norm("model.norm", "norm", False),
  ]
  if config.qk_norm:
    rules += _norm(f"{attn}.q_norm", f"{ours}attention.query_norm", False, n)
    rules += _norm(f"{attn}.k_norm", f"{ours}attention.key_norm", False, n)
  if not config.tied_head:
    rules.append(Rule("lm_head.weight", ("untied_head",), SAME))
  return Table(tuple(rules))


LLM_TABLES = {"InternLM2ForCausalLM": internlm2, "Qwen2ForCausalLM": qwen2}


def vqvae(config: VQVAEConfig) -> Table:
  """VAR's `VQVAE` <-> `models.vqvae.VQVAE`."""
  last = len(config.width_multipliers) - 1
  rules = [
    Rule("quantize.embedding.weight", ("quantizer.codebook",), SAME),
    Rule(
      "quantize.quant_resi.qresi_ls.{}.weight",
      ("quantizer.phi_kernel",),
      CONV,
      config.num_phis,
    ),
    Rule(
      "quantize.quant_resi.qresi_ls.{}.bias",
      ("quantizer.phi_bias",),
      SAME,
      config.num_phis,
    ),
    *_conv("quant_conv", "quant_conv"),
    *_conv("post_quant_conv", "post_quant_conv"),
  ]
  widths = [config.width * m for m in config.width_multipliers]
  before = {
    "encoder": [config.width, *widths[:-1]],
    "decoder": [*widths[1:], widths[-1]],
  }
  for half, levels, resample, first, extra in (
    ("encoder", "down", "downsample", 0, 0),
    ("decoder", "up", "upsample", 1, 1),
  ):
    rules += _conv(f"{half}.conv_in", f"{half}.conv_in")
    rules += _conv(f"{half}.conv_out", f"{half}.conv_out")
    rules += _norm(f"{half}.norm_out", f"{half}.norm_out", True)
    for block in ("block_1", "block_2"):
      rules += _residual(f"{half}.mid.{block}", f"{half}.middle.{block}", False)
    rules += _spatial(f"{half}.mid.attn_1", f"{half}.middle.attention")
    for i, width in enumerate(widths):
      torch, ours = f"{half}.{levels}.{i}", f"{half}.levels.{i}"
      for j in range(config.blocks_per_level + extra):
        widens = j == 0 and before[half][i] != width
        rules += _residual(f"{torch}.block.{j}", f"{ours}.blocks.{j}", widens)
        if i == last:
          rules += _spatial(f"{torch}.attn.{j}", f"{ours}.attentions.{j}")
      if first <= i < last + first:
        rules += _conv(f"{torch}.{resample}.conv", f"{ours}.resample")
  hits = (len(config.scales), config.num_codes)
  return Table(tuple(rules), (Carried("quantize.ema_vocab_hit_SV", hits),))


def _residual(torch: str, ours: str, widens: bool) -> Iterator[Rule]:
  for i in ("1", "2"):
    yield from _norm(f"{torch}.norm{i}", f"{ours}.norm_{i}", True)
    yield from _conv(f"{torch}.conv{i}", f"{ours}.conv_{i}")
  if widens:
    yield from _conv(f"{torch}.nin_shortcut", f"{ours}.shortcut")


def _spatial(torch: str, ours: str) -> Iterator[Rule]:
  yield from _norm(f"{torch}.norm", f"{ours}.norm", True)
  yield from _conv(f"{torch}.qkv", f"{ours}.qkv")
  yield from _conv(f"{torch}.proj_out", f"{ours}.out")


def internvit(config: VisionConfig) -> Table:
  """InternVL's `vision_model.*`, `mlp1.*` <-> `models.vit.VisionEncoder`."""
  n = config.num_layers
  embeddings = "vision_model.embeddings"
  block, ours = "vision_model.encoder.layers.{}.", "tower.layers."
  bias = config.norm == "layer_norm"
  rules = [
    Rule(
      f"{embeddings}.class_embedding", ("tower.class_embedding",), TWICE_BATCHED
    ),
    Rule(
      f"{embeddings}.position_embedding", ("tower.position_embedding",), BATCHED
    ),
    *_conv(f"{embeddings}.patch_embedding", "tower.patch_embedding"),
    *_linear(f"{block}attn.qkv", f"{ours}qkv", config.qkv_bias, n),
    *_linear(f"{block}attn.proj", f"{ours}out", True, n),
    *_linear(f"{block}mlp.fc1", f"{ours}up", True, n),
    *_linear(f"{block}mlp.fc2", f"{ours}down", True, n),
    *_norm(f"{block}norm1", f"{ours}norm_1", bias, n),
    *_norm(f"{block}norm2", f"{ours}norm_2", bias, n),
    Rule(f"{block}ls1", (f"{ours}scale_1",), SAME, n),
    Rule(f"{block}ls2", (f"{ours}scale_2",), SAME, n),
    *_norm("mlp1.0", "connector.norm", True),
    *_linear("mlp1.1", "connector.up", True),
    *_linear("mlp1.3", "connector.down", True),
  ]
  if config.qk_norm:
    rules += _norm(f"{block}attn.q_norm", f"{ours}query_norm", False, n)
    rules += _norm(f"{block}attn.k_norm", f"{ours}key_norm", False, n)
  return Table(tuple(rules))


def llm(config: LLMConfig) -> Table:
  """The decoder, in the naming of its family."""
  return LLM_TABLES[architecture(config)](config)


def architecture(config: LLMConfig) -> str:
  """The authors' class for a decoder; Qwen2 has biases on q, k, v only."""
  biased = config.qkv_bias and not config.out_bias
  return "Qwen2ForCausalLM" if biased else "InternLM2ForCausalLM"


def argenseg(config: ModelConfig) -> Table:
  """The authors' whole model <-> `models.argenseg.ARGenSeg`."""
  own = Table(
    (
      *_linear("word_embed", "word_embed", True),
      Rule("pos_1LC", ("pos_embed",), BATCHED),
      Rule("lvl_embed.weight", ("lvl_embed",), SAME),
    )
  )
  return (
    internvit(config.vision).prefixed("", "vision.")
    + llm(config.llm).prefixed("language_model.", "llm.")
    + own
    + vqvae(config.vqvae).prefixed("image_tokenizer.", "vqvae.")
  )
