"""One table per part of the model: PyTorch name <-> path of our variable."""

from collections.abc import Iterator

from argenseg_jax.model_config import ModelConfig, VisionConfig, VQVAEConfig
from argenseg_jax.torch_weights import families
from argenseg_jax.torch_weights.tables import (
  BATCHED,
  CONV,
  SAME,
  TWICE_BATCHED,
  Carried,
  Rule,
  Table,
  conv,
  linear,
  norm,
)


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
    *conv("quant_conv", "quant_conv"),
    *conv("post_quant_conv", "post_quant_conv"),
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
    rules += conv(f"{half}.conv_in", f"{half}.conv_in")
    rules += conv(f"{half}.conv_out", f"{half}.conv_out")
    rules += norm(f"{half}.norm_out", f"{half}.norm_out", True)
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
        rules += conv(f"{torch}.{resample}.conv", f"{ours}.resample")
  hits = (len(config.scales), config.num_codes)
  return Table(tuple(rules), (Carried("quantize.ema_vocab_hit_SV", hits),))


def _residual(torch: str, ours: str, widens: bool) -> Iterator[Rule]:
  for i in ("1", "2"):
    yield from norm(f"{torch}.norm{i}", f"{ours}.norm_{i}", True)
    yield from conv(f"{torch}.conv{i}", f"{ours}.conv_{i}")
  if widens:
    yield from conv(f"{torch}.nin_shortcut", f"{ours}.shortcut")


def _spatial(torch: str, ours: str) -> Iterator[Rule]:
  yield from norm(f"{torch}.norm", f"{ours}.norm", True)
  yield from conv(f"{torch}.qkv", f"{ours}.qkv")
  yield from conv(f"{torch}.proj_out", f"{ours}.out")


def internvit(config: VisionConfig) -> Table:
  """InternVL's `vision_model.*`, `mlp1.*` <-> `models.vit.VisionEncoder`."""
  n = config.num_layers
  embeddings = "vision_model.embeddings"
  block, ours = "vision_model.encoder.layers.{}.", "tower.layers."
  bias = config.norm == "layer_norm"
  rules = [
    Rule(
      f"{embeddings}.class_embedding",
      ("tower.class_embedding",),
      TWICE_BATCHED,
    ),
    Rule(
      f"{embeddings}.position_embedding",
      ("tower.position_embedding",),
      BATCHED,
    ),
    *conv(f"{embeddings}.patch_embedding", "tower.patch_embedding"),
    *linear(f"{block}attn.qkv", f"{ours}qkv", config.qkv_bias, n),
    *linear(f"{block}attn.proj", f"{ours}out", True, n),
    *linear(f"{block}mlp.fc1", f"{ours}up", True, n),
    *linear(f"{block}mlp.fc2", f"{ours}down", True, n),
    *norm(f"{block}norm1", f"{ours}norm_1", bias, n),
    *norm(f"{block}norm2", f"{ours}norm_2", bias, n),
    Rule(f"{block}ls1", (f"{ours}scale_1",), SAME, n),
    Rule(f"{block}ls2", (f"{ours}scale_2",), SAME, n),
    *norm("mlp1.0", "connector.norm", True),
    *linear("mlp1.1", "connector.up", True),
    *linear("mlp1.3", "connector.down", True),
  ]
  if config.qk_norm:
    rules += norm(f"{block}attn.q_norm", f"{ours}query_norm", False, n)
    rules += norm(f"{block}attn.k_norm", f"{ours}key_norm", False, n)
  return Table(tuple(rules))


def argenseg(config: ModelConfig) -> Table:
  """The authors' whole model <-> `models.argenseg.ARGenSeg`."""
  own = Table(
    (
      *linear("word_embed", "word_embed", True),
      Rule("pos_1LC", ("pos_embed",), BATCHED),
      Rule("lvl_embed.weight", ("lvl_embed",), SAME),
    )
  )
  return (
    internvit(config.vision).prefixed("", "vision.")
    + families.table(config.llm).prefixed("language_model.", "llm.")
    + own
    + vqvae(config.vqvae).prefixed("image_tokenizer.", "vqvae.")
  )
