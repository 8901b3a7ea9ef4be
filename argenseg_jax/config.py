"""From an editable `ml_collections.ConfigDict` to frozen dataclasses.

`ConfigDict` stops here: everything below reads the dataclasses of this module.
`configs/base.py` holds every key of a run with a comment; an unknown or missing
key is an error that names it.
"""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from argenseg_jax.scales import Scales


class ConfigError(ValueError):
  """A configuration that cannot be used; the message names the key."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """InternViT-style tower, pixel shuffle and connector."""

  image_side: int = 448
  patch_side: int = 14
  width: int = 1024
  num_layers: int = 24
  num_heads: int = 16
  mlp_width: int = 4096
  norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
  norm_eps: float = 1e-6
  qkv_bias: bool = True
  qk_norm: bool = False
  layer_scale_init: float = 0.1
  drop_path: float = 0.0
  select_layer: int = -1  # Which layer's output the connector reads.
  pixel_shuffle: int = 2  # Neighbours merged along each side; 1 merges none.
  # "patch" cuts the image into patches with one convolution; "conv" reaches the
  # same grid by stride-2 3x3 convolutions, which small data learns better.
  stem: Literal["patch", "conv"] = "patch"
  stem_blocks: int = 0  # Residual 3x3 convolutions that follow a "conv" stem.

  @property
  def grid_side(self) -> int:
    return self.image_side // self.patch_side

  @property
  def embeddings_side(self) -> int:
    return self.grid_side // self.pixel_shuffle

  @property
  def num_embeddings(self) -> int:
    """Vision embeddings that one image gives to the language model."""
    return self.embeddings_side**2


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """Decoder-only language model: InternLM2, Qwen2 and Qwen3 families."""

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  # Whose names of tensors and config.json import reads and export writes.
  family: Literal["internlm2", "qwen2", "qwen3"] = "internlm2"
  norm_eps: float = 1e-5
  rope_theta: float = 1e6
  rope_scaling: Literal["none", "linear", "dynamic"] = "none"
  rope_factor: float = 1.0
  max_positions: int = 32768
  rope_fraction: float = 1.0  # Share of each head's dimensions that rotate.
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: bool = False
  tied_head: bool = False
  embedding_std: float = 0.02  # Of the word embedding's start.
  pad_id: int | None = None  # This row of the word embedding gets no gradient.
  # Head 0 of each layer starts with equal query and key projections, so that a
  # position first attends to positions that look like it.
  tie_first_head_init: bool = False


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
  """VAR's multi-scale image tokenizer."""

  image_side: int = 256
  # Squares of pixels that encoder and decoder treat as one; more than 1 makes
  # a small tokenizer quick.
  patch_side: int = 1
  scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
  width: int = 160
  width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  blocks_per_level: int = 2
  latent_channels: int = 32
  num_codes: int = 4096
  norm_groups: int = 32
  num_phis: int = 4
  phi_ratio: float = 0.5
  commitment: float = 0.25

  @property
  def pyramid(self) -> Scales:
    return Scales(self.scales, self.num_phis)

  @property
  def codes_per_mask(self) -> int:
    return self.pyramid.num_codes


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where samples come from and what a row of a batch holds."""

  path: str
  # The layout of `path`, see docs/data.md; "meta" mixes several.
  source: Literal[
    "ref_shapes",
    "jsonl",
    "meta",
    "refer",
    "grefer",
    "reason_seg",
    "coco_panoptic",
    "ade20k",
    "text_to_image",
    "folder",
    "ref_coco",
    "array_record",
  ] = "ref_shapes"
  split: str = "train"  # Where the layout has splits.
  root: str | None = None  # Where its pictures are, if not in the usual place.
  # A tokenizer.json; None: that of the start's model, else the shipped one.
  text_tokenizer: str | None = None
  # Request template, how expressions are joined in it, and whether a request
  # holds all expressions of an object or one of them (in training any, drawn
  # from the seed; in evaluation the first).
  request: Literal[
    "referring",
    "semantic",
    "reasoning",
    "instance",
    "anomaly",
    "point",
    "box",
    "drawn",
    "generation",
    "question",
    "choice",
    "caption",
    "free",
  ] = "referring"
  # Ask for each mask by a point or box of it, in words or drawn in red on the
  # picture, in place of its expressions; "": do not.
  interactive: Literal["", "point", "box", "drawn_point", "drawn_box"] = ""
  join: Literal["training", "evaluation"] = "training"
  protocol: Literal["merged", "per_expression"] = "merged"
  # "{description}" stands for what the source calls the target.
  answer: str = "Sure, the segmentation result: <mask>."
  absent_answer: str = "There is no such thing."
  system_message: str = ""  # Empty: no system block.
  sequence_length: int = 8192  # 0: no text, for training the VQ-VAE.
  image_side: int = 448
  mask_side: int = 256
  mask_intermediate_side: int | None = 512  # Masks take this size on the way.
  mask_channels: int = 3
  max_images: int = 1  # Places for pictures of a sample; 0: pictures unread.
  max_masks: int = 1
  pack: int = 1  # Samples of a row in training.
  pad_square: bool = False  # Keep the aspect of pictures and masks.
  # Above 0: in training, pictures pass through JPEG of a quality drawn from
  # this one to 100.
  jpeg_quality: int = 0
  resize: Literal["pillow", "opencv"] = "pillow"
  seed: int = 0  # Of the order and of all random choices.
  workers: int = 0  # Processes that make batches; 0: threads of this one.
  threads: int = 1
  prefetch: int = 4  # Batches made in advance.
  cache: bool = False  # Keep resized pictures and masks in memory.
  # Tokenise every mask once before the decoder trains, not in every step.
  cache_codes: bool = False
  codes: str = ""  # A file of `argenseg data tokenize` instead.
  # An easier split (of ref_shapes) that the first steps are drawn from.
  warmup_split: str = ""
  warmup_steps: int = 0
  max_bad_share: float = 0.1  # Training stops when more records are bad.

  @property
  def tokenized(self) -> bool:
    """Whether the decoder trains on codes, not on masks."""
    return self.cache_codes or bool(self.codes)


# Of `DataConfig`: what does not change what batches hold.
SPEED_KEYS = ("workers", "threads", "prefetch", "cache", "max_bad_share")


@dataclasses.dataclass(frozen=True)
class TokenIds:
  """Ids of the special tokens; codes follow from `first_code` on."""

  pad: int
  im_start: int
  im_end: int
  img_start: int
  img_end: int
  img_context: int
  mask: int
  ge_start: int
  ge_end: int
  mask_context: int
  first_code: int
  bos: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The whole of ARGenSeg."""

  name: str
  vision: VisionConfig
  llm: LLMConfig
  vqvae: VQVAEConfig
  token_ids: TokenIds
  # Full attention between the codes of one scale (VAR's mask) instead of plain
  # causal attention.
  full_attention_in_scale: bool = False
  # Full attention between the prompt's tokens (prefix language model).
  bidirectional_prompt: bool = False
  # Vision embeddings and code slots start with the same 2-D sine-cosine
  # positions on aligned grids.
  aligned_positions: bool = False


def from_mapping(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
  """Builds dataclass `cls` from a mapping, strictly.

  Args:
    cls: a dataclass; nested dataclasses are built from nested mappings.
    values: a mapping, `ConfigDict` included.
    where: dotted name of `values`, for messages.

  Raises:
    ConfigError: an unknown or missing key, or a value of the wrong type.
  """
  prefix = f"{where}." if where else ""
  if not isinstance(values, Mapping) and not hasattr(values, "items"):
    raise ConfigError(f"config key {where!r} must be a group of keys.")
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      close = difflib.get_close_matches(key, fields, n=1)
      hint = f"; did you mean {prefix + close[0]!r}?" if close else ""
      raise ConfigError(f"unknown config key {prefix + key!r}{hint}")
  built = {}
  for name, field in fields.items():
    if name in values:
      built[name] = _convert(hints[name], values[name], prefix + name)
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ConfigError(f"missing config key {prefix + name!r}")
  return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return from_mapping(hint, value, where)
  if origin is Literal:
    if value not in typing.get_args(hint):
      choices = ", ".join(map(repr, typing.get_args(hint)))
      raise ConfigError(f"config key {where!r} is {value!r}; use {choices}")
    return value
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in typing.get_args(hint):
      return None
    (inner,) = (a for a in typing.get_args(hint) if a is not type(None))
    return _convert(inner, value, where)
  if origin is tuple:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
      raise ConfigError(f"config key {where!r} must be a list, got {value!r}")
    inner = typing.get_args(hint)[0]
    return tuple(
      _convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value)
    )
  if hint is Any:
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(
      f"config key {where!r} must be {hint.__name__}, got {value!r}"
    )
  return value


def to_dict(config: Any) -> dict[str, Any]:
  """The reverse of `from_mapping`, with lists for tuples (JSON-ready)."""

  def plain(value):
    if isinstance(value, dict):
      return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
      return [plain(v) for v in value]
    return value

  return plain(dataclasses.asdict(config))


def replace(config: Any, changes: Mapping[str, Any]) -> Any:
  """Returns `config` with dotted keys replaced: {"llm.num_layers": 2}."""
  values = to_dict(config)
  for key, value in changes.items():
    *groups, last = key.split(".")
    node = values
    for group in groups:
      if not isinstance(node.get(group), dict):
        raise ConfigError(f"unknown config key {key!r}")
      node = node[group]
    node[last] = value
  return from_mapping(type(config), values)


@dataclasses.dataclass(frozen=True)
class ModelChoice:
  """A named variant (or "": the start's model) and changes to it."""

  variant: str
  overrides: tuple[str, ...] = ()  # Keys of ModelConfig: "llm.num_layers=2".

  def changes(self) -> dict[str, Any]:
    """The overrides by dotted key, values as Python literals or plain text."""
    found = {}
    for override in self.overrides:
      key, equals, text = override.partition("=")
      if not equals:
        raise ConfigError(
          f"config key 'model.overrides' holds {override!r}; write KEY=VALUE."
        )
      try:
        found[key] = ast.literal_eval(text)
      except (SyntaxError, ValueError):
        found[key] = text
    return found


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Which optimizer, its schedule, clipping and freezing."""

  name: Literal["adamw", "muon"]  # Keys of training/optimizer.OPTIMIZERS.
  learning_rate: float
  # Peak learning rate of the hidden matrices under Muon, in AdamW's scale.
  muon_learning_rate: float
  schedule: Literal["cosine", "linear", "constant"]
  warmup_steps: int
  end_fraction: float  # Last learning rate as a share of the peak.
  b1: float
  b2: float
  eps: float
  weight_decay: float  # Not on norms, biases and one-dimensional parameters.
  clip_norm: float
  frozen: tuple[str, ...]  # Path prefixes that do not train: "vision.tower".
  ema_decay: float  # Of the average of the weights that is kept; 0: none.


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """How the decoder's loss is formed; the defaults are the paper's."""

  # "token": mean over all codes. "scale": mean within each scale, then over
  # the scales, so that the few coarse codes count.
  code_average: Literal["token", "scale"]
  # Share of samples whose scale inputs are zero from a random scale on.
  drop_scale_inputs: float
  z_loss: float
  # Of `linear_cross_entropy`; "auto" is the platform's own. An explicit choice
  # that cannot run fails. "reference" keeps all logits.
  implementation: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"


@dataclasses.dataclass(frozen=True)
class TokenizerTrainingConfig:
  """What training an image tokenizer from scratch on masks needs."""

  reconstruction: Literal["mse", "bce_dice"]
  warm_start_steps: int  # Steps without the quantiser.
  kmeans_iterations: int  # Of the codebook's start; 0 keeps the random one.
  kmeans_seg_masks: int  # Masks whose latents the start and the prior see.
  revive_every: int  # Steps between revivals of dead codes; 0 never.
  revive_until: int  # No revival after this step.
  # Entropy constraint: codes cost -weight * log(frequency in their scale),
  # counted anew every so many steps from a step on, and once at the end.
  entropy_weight: float
  entropy_from: int
  entropy_every: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one axis may be -1 (what is left)."""

  data: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length, logging, saving and precision of a run."""

  steps: int
  global_batch_size: int
  accumulate_steps: int  # Turns in which a batch is worked through.
  log_every: int
  eval_every: int  # 0: only at the end.
  save_every: int
  keep: int  # Checkpoints kept; the newest ones.
  max_skipped: int  # Steps in a row without a finite loss; 0: any number.
  compute_dtype: Literal["float32", "bfloat16"]
  param_dtype: Literal["float32", "bfloat16"]
  remat: Literal["none", "full", "dots"]
  keep_every: int = 0  # Checkpoints of every so many steps are kept too.
  keep_best: int = 0  # And so many of the best ones,
  best_by: Literal["loss", "ciou"] = "loss"  # lowest loss or highest cIoU.
  # SIGTERM ends a run wherever it is after so many seconds; 0: it may finish
  # what it does.
  grace_seconds: float = 30.0
  # A step that takes this many times the median gets its stacks written.
  stall_factor: float = 20.0  # 0: none does.


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What is measured during and after training."""

  splits: tuple[str, ...]
  max_samples: int  # Per split; 0 takes all.
  batch_size: int
  max_text: int  # Text tokens of an answer.
  max_masks: int
  start_with_mask: bool  # Force `<ge_start>` instead of letting text decide.


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Low-rank adapters for the decoder's task, see `models/lora.py`."""

  rank: int  # 0: no adapters, the weights themselves train.
  alpha: float  # Adapters count alpha / rank times.
  # Patterns of projections: "llm.layers.attention.*".
  targets: tuple[str, ...]
  # Patterns of parameters that train in full beside them: "vision.connector".
  train: tuple[str, ...]
  # How everything else, which stands still, is kept.
  base: Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """How one task trains."""

  optimizer: OptimizerConfig
  train: TrainConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything that defines a training run.

  The tasks run in order, each in its own folder of the work directory; the
  decoder takes the image tokenizer that was trained just before it.
  """

  tasks: tuple[Literal["vqvae", "mllm"], ...]
  seed: int
  init_from: str | None  # Checkpoint of a whole model or an image tokenizer.
  model: ModelChoice
  data: DataConfig
  vqvae: StageConfig
  mllm: StageConfig
  loss: LossConfig
  lora: LoRAConfig
  tokenizer_training: TokenizerTrainingConfig
  mesh: MeshConfig
  eval: EvalConfig

  def adapters(self, task: str) -> LoRAConfig | None:
    """Settings of the adapters that a task trains instead of the weights."""
    return self.lora if self.lora.rank and task == "mllm" else None

  def stage(self, task: str) -> StageConfig:
    """The settings of one of `tasks`."""
    return getattr(self, task)


def run_config(
  values: Mapping[str, Any], *, needs_data: bool = True
) -> RunConfig:
  """A `RunConfig` from a config file's values, which write "" and 0 for None.

  Args:
    values: of the config file.
    needs_data: whether `data.path` must be set.

  Raises:
    ConfigError: an unknown or missing key, or no data.
  """
  values = to_plain(values)
  values["init_from"] = values.get("init_from") or None
  data = values.get("data", {})
  for key in ("root", "text_tokenizer", "mask_intermediate_side"):
    data[key] = data.get(key) or None
  config = from_mapping(RunConfig, values)
  if needs_data and not config.data.path:
    raise ConfigError(
      "config key 'data.path' is empty; give --config.data.path."
    )
  return config


def to_plain(values: Any) -> Any:
  """`ConfigDict`s as dictionaries, all the way down."""
  if hasattr(values, "items"):
    return {key: to_plain(value) for key, value in values.items()}
  return values
