"""`config.json` of Hugging Face style folders <-> `ModelConfig`.

Reads InternVL's layout (`vision_config`, `llm_config`) and that of the recorded
goldens (`vision`, `llm`, `vae`, `patch_nums`, `text_vocab`). What tensors tell
by their shapes is taken from them.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from argenseg_jax.data.text import ADDED_TOKENS
from argenseg_jax.model_config import (
  LLMConfig,
  ModelConfig,
  TokenIds,
  VisionConfig,
  VQVAEConfig,
)
from argenseg_jax.scales import SCALES_256, SCALES_512, Scales
from argenseg_jax.torch_weights import families
from argenseg_jax.torch_weights.tensors import TensorInfo, WeightsError

Tensors = Mapping[str, TensorInfo]


def read(folder: pathlib.Path) -> dict[str, Any]:
  """The folder's `config.json`.

  Raises:
    WeightsError: absent or no JSON object.
  """
  path = folder / "config.json"
  try:
    config = json.loads(path.read_text())
  except OSError as error:
    raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
  except (ValueError, RecursionError) as error:
    raise WeightsError(f"{path} is no JSON: {error}.") from error
  if not isinstance(config, dict):
    raise WeightsError(f"{path} is no JSON object.")
  return config


def group(config: Mapping[str, Any], name: str) -> dict[str, Any]:
  """`llm` or `vision`, under either of its names."""
  found = config.get(f"{name}_config", config.get(name))
  if not isinstance(found, dict):
    raise WeightsError(f"config.json has no group {name}_config.")
  return found


def llm_config(values: Mapping[str, Any], *, tied_head: bool) -> LLMConfig:
  """A language model's config.

  Raises:
    WeightsError: an architecture or a rope scaling that we do not have.
  """
  family, record = _family(values)
  if values.get("hidden_act", "silu") != "silu":
    raise WeightsError(f"config.json asks for {values['hidden_act']!r}: silu.")
  if values.get("use_sliding_window"):
    raise WeightsError(
      "config.json asks for use_sliding_window, which is not supported."
    )
  # Transformers 5 keeps what it knows of RoPE in one group.
  scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
  kind = scaling.get("type", scaling.get("rope_type", "none"))
  if kind == "default":
    kind = "none"
  if kind not in ("none", "linear", "dynamic"):
    raise WeightsError(
      f"config.json asks for rope scaling {kind!r}; use linear or dynamic."
    )
  width = _get(values, "hidden_size")
  heads = _get(values, "num_attention_heads")
  kv_heads = values.get("num_key_value_heads") or heads
  switches = record.switches(values)
  head_dim = switches.pop("head_dim", values.get("head_dim"))
  if (not head_dim and width % heads) or heads % kv_heads:
    raise WeightsError(
      f"config.json has hidden_size {width}, num_attention_heads {heads}, "
      f"num_key_value_heads {kv_heads}; each must be a multiple of the next."
    )
  return LLMConfig(
    vocab_size=_get(values, "vocab_size"),
    width=width,
    num_layers=_get(values, "num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim or width // heads,
    mlp_width=_get(values, "intermediate_size"),
    norm_eps=float(values.get("rms_norm_eps", 1e-6)),
    rope_theta=float(
      values.get("rope_theta", scaling.get("rope_theta", 10000))
    ),
    rope_scaling=kind,
    rope_factor=float(scaling.get("factor", 1.0)),
    max_positions=values.get("max_position_embeddings", 32768),
    tied_head=tied_head,
    pad_id=values.get("pad_token_id", record.pad_id),
    family=family,
    **switches,
  )


def _family(values: Mapping[str, Any]) -> tuple[Any, families.Family]:
  """The family of a language model's config, by its architecture.

  Raises:
    WeightsError: one that we do not have.
  """
  name = (values.get("architectures") or ["?"])[0]
  for family, record in families.FAMILIES.items():
    if record.architecture == name:
      return family, record
  known = " or ".join(f.architecture for f in families.FAMILIES.values())
  raise WeightsError(
    f"config.json asks for language model {name}; use {known}."
  )


def vision_config(config: Mapping[str, Any]) -> VisionConfig:
  """The vision tower's and connector's config."""
  values = group(config, "vision")
  if config.get("ps_version", "v2") != "v2":
    raise WeightsError(
      f"config.json asks for pixel shuffle {config['ps_version']!r}; only 'v2' "
      "is supported."
    )
  norm = values.get("norm_type", "rms_norm")
  if norm not in ("layer_norm", "rms_norm"):
    raise WeightsError(
      f"config.json asks for norm_type {norm!r}; use layer_norm or rms_norm."
    )
  side, patch = values.get("image_size", 448), values.get("patch_size", 14)
  shuffle = round(1 / config.get("downsample_ratio", 0.5))
  if side % (patch * shuffle):
    raise WeightsError(
      f"config.json has image_size {side}, which is no multiple of {shuffle} "
      f"patches of {patch}."
    )
  width = _get(values, "hidden_size")
  heads = _get(values, "num_attention_heads")
  if width % heads:
    raise WeightsError(
      f"config.json has a vision tower {width} wide, which {heads} heads do "
      "not divide."
    )
  return VisionConfig(
    image_side=side,
    patch_side=patch,
    width=width,
    num_layers=_get(values, "num_hidden_layers"),
    num_heads=heads,
    mlp_width=_get(values, "intermediate_size"),
    norm=norm,
    norm_eps=float(values.get("layer_norm_eps", 1e-6)),
    qkv_bias=bool(values.get("qkv_bias", False)),
    qk_norm=bool(values.get("qk_normalization", True)),
    layer_scale_init=float(values.get("initializer_factor", 0.1)),
    drop_path=float(values.get("drop_path_rate", 0.0)),
    select_layer=config.get("select_layer", -1),
    pixel_shuffle=shuffle,
  )


def vqvae_config(
  config: Mapping[str, Any], tensors: Tensors, where: str
) -> VQVAEConfig:
  """The image tokenizer's config, from the shapes of VAR's tensors.

  Args:
    config: for `patch_nums` and `vae`, where it has them; the scales otherwise
      follow from the number of scales or codes.
    tensors: names without a prefix.
    where: for messages.
  """

  def shape(name):
    if name not in tensors or not tensors[name].shape:
      raise WeightsError(
        f"{where} lacks tensor {name!r} of an image tokenizer."
      )
    return tensors[name].shape

  def count(pattern):
    n = 0
    while pattern.format(n) in tensors:
      n += 1
    return n

  width = shape("encoder.conv_in.weight")[0]
  widths = [
    shape(f"encoder.down.{i}.block.0.conv1.weight")[0]
    for i in range(count("encoder.down.{}.block.0.conv1.weight"))
  ]
  num_codes, channels = shape("quantize.embedding.weight")
  vae = config.get("vae") or {}
  if vae.get("using_znorm"):
    raise WeightsError(f"{where} needs using_znorm, which is not supported.")
  sides = config.get("patch_nums") or _known_scales(tensors)
  try:
    sides = Scales(tuple(sides)).sides
  except (TypeError, ValueError) as error:
    raise WeightsError(
      f"config.json has patch_nums {sides!r}; rising side lengths are needed."
    ) from error
  return VQVAEConfig(
    image_side=sides[-1] * 2 ** (len(widths) - 1),
    scales=tuple(sides),
    width=width,
    width_multipliers=tuple(w // width for w in widths),
    blocks_per_level=count("encoder.down.0.block.{}.conv1.weight"),
    latent_channels=channels,
    num_codes=num_codes,
    num_phis=count("quantize.quant_resi.qresi_ls.{}.weight"),
    phi_ratio=float(vae.get("quant_resi", 0.5)),
    commitment=float(vae.get("beta", 0.25)),
  )


def _known_scales(tensors: Tensors) -> tuple[int, ...]:
  """256 px and 512 px differ in the number of position embeddings."""
  slots = tensors.get("pos_1LC")
  is_512 = slots and slots.shape[1] == Scales(SCALES_512).num_codes
  return SCALES_512 if is_512 else SCALES_256


def token_ids(
  config: Mapping[str, Any],
  first_code: int,
  folder: pathlib.Path | None,
  text_tokenizer: pathlib.Path | None = None,
) -> TokenIds:
  """Special tokens: from `text_tokenizer` or the files of a text tokenizer in
  `folder`, else as released.

  The four tokens that ARGenSeg adds stand right before the codes.
  """
  if "set" in config:  # A recorder's toy vocabulary.
    special = {
      "</s>": 2,
      "<s>": 1,
      "<|im_start|>": 3,
      "<|im_end|>": 4,
      "<img>": first_code - 8,
      "</img>": first_code - 7,
      "<IMG_CONTEXT>": first_code - 6,
    }
  else:
    special = dict(_family(group(config, "llm"))[1].token_ids)
  special |= _tokenizer_ids(folder, text_tokenizer)
  new = {t: first_code - 4 + i for i, t in enumerate(ADDED_TOKENS)}
  special |= {t: i for t, i in new.items() if t not in special}
  return TokenIds(
    pad=special.get("</s>", special.get("<|endoftext|>", 0)),
    bos=special.get("<s>"),
    im_start=special["<|im_start|>"],
    im_end=special["<|im_end|>"],
    img_start=special["<img>"],
    img_end=special["</img>"],
    img_context=special["<IMG_CONTEXT>"],
    mask=special["<mask>"],
    ge_start=special["<ge_start>"],
    ge_end=special["<ge_end>"],
    mask_context=special["<MASK_CONTEXT>"],
    first_code=first_code,
  )


def _tokenizer_ids(
  folder: pathlib.Path | None, text_tokenizer: pathlib.Path | None
) -> dict[str, int]:
  """Added tokens of a text tokenizer's files, by text; the last named win."""
  ids: dict[str, int] = {}
  beside = ("tokenizer_config.json", "added_tokens.json")
  files = [folder / name for name in beside] if folder is not None else []
  if text_tokenizer is not None:
    files.append(text_tokenizer)
  for path in files:
    if not path.is_file():
      continue
    try:
      values = json.loads(path.read_text())
      decoder = values.get("added_tokens_decoder", {})
      ids |= {entry["content"]: int(i) for i, entry in decoder.items()}
      if path.name == "added_tokens.json":
        ids |= {text: int(i) for text, i in values.items()}
      for entry in values.get("added_tokens", []):
        ids[entry["content"]] = int(entry["id"])
    except (
      *(ValueError, KeyError, TypeError, AttributeError),
      *(OverflowError, RecursionError),
    ) as error:
      raise WeightsError(
        f"{path} is no file of a text tokenizer ({error!r})."
      ) from error
  return ids


def _get(values: Mapping[str, Any], key: str) -> int:
  value = values.get(key)
  if type(value) is not int or value < 1:
    raise WeightsError(
      f"config.json has {key}: {value!r}; a positive whole number is needed."
    )
  return value


def write_llm(config: LLMConfig) -> dict[str, Any]:
  """The `config.json` of the language model alone."""
  family = families.of(config)
  values = {
    "architectures": [family.architecture],
    "hidden_act": "silu",
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_positions,
    "model_type": family.model_type,
    "num_attention_heads": config.num_heads,
    "num_hidden_layers": config.num_layers,
    "num_key_value_heads": config.num_kv_heads,
    "pad_token_id": config.pad_id,
    "rms_norm_eps": config.norm_eps,
    "rope_scaling": None,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tied_head,
    "vocab_size": config.vocab_size,
  }
  if config.rope_scaling != "none":
    values["rope_scaling"] = {
      "type": config.rope_scaling,
      "factor": config.rope_factor,
    }
  return values | family.values(config)


def write_vqvae(config: VQVAEConfig) -> dict[str, Any]:
  """The keys of `config.json` that describe the image tokenizer."""
  return {
    "patch_nums": list(config.scales),
    "vae": {
      "beta": config.commitment,
      "ch": config.width,
      "ch_mult": list(config.width_multipliers),
      "num_res_blocks": config.blocks_per_level,
      "quant_resi": config.phi_ratio,
      "share_quant_resi": config.num_phis,
      "vocab_size": config.num_codes,
      "z_channels": config.latent_channels,
    },
  }


def write(config: ModelConfig) -> dict[str, Any]:
  """A whole model's `config.json` in InternVL's layout."""
  v = config.vision
  return {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "downsample_ratio": 1 / v.pixel_shuffle,
    "force_image_size": v.image_side,
    "ps_version": "v2",
    "select_layer": v.select_layer,
    "template": "internvl2_5",
    "text_vocab": config.token_ids.first_code,
    "llm_config": write_llm(config.llm),
    "vision_config": {
      "architectures": ["InternVisionModel"],
      "drop_path_rate": v.drop_path,
      "hidden_act": "gelu",
      "hidden_size": v.width,
      "image_size": v.image_side,
      "initializer_factor": v.layer_scale_init,
      "intermediate_size": v.mlp_width,
      "layer_norm_eps": v.norm_eps,
      "model_type": "intern_vit_6b",
      "norm_type": v.norm,
      "num_attention_heads": v.num_heads,
      "num_channels": 3,
      "num_hidden_layers": v.num_layers,
      "patch_size": v.patch_side,
      "qk_normalization": v.qk_norm,
      "qkv_bias": v.qkv_bias,
    },
    **write_vqvae(config.vqvae),
  }
