"""Settings of a run and their types, in frozen dataclasses.

`config_parsing` reads them from config files; `configs/base.py` explains every
key. Sizes of models are in `model_config`.
"""

import ast
import dataclasses
from typing import Annotated, Any, Literal

from argenseg_jax.ranges import (
  AxisSize,
  Count,
  Decay,
  NonNegative,
  Positive,
  PositiveInt,
  Range,
  Seed,
  Share,
)


class ConfigError(ValueError):
  """A configuration that cannot be used; the message names the key."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where samples come from and what a row of a batch holds."""

  path: str
  # The layout of `path`, a name of data/sources/registry.py and docs/data.md;
  # "meta" mixes several.
  source: str = "jsonl"
  split: str = "train"  # Where the layout has splits.
  root: str | None = None  # Where its images are, if not in the usual place.
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
  # image, in place of its expressions; "": do not.
  interactive: Literal["", "point", "box", "drawn_point", "drawn_box"] = ""
  join: Literal["training", "evaluation"] = "training"
  protocol: Literal["merged", "per_expression"] = "merged"
  # "{description}" stands for what the source calls the target.
  answer: str = "Sure, the segmentation result: <mask>."
  absent_answer: str = "There is no such thing."
  system_message: str = ""  # Empty: no system block.
  sequence_length: Count = 8192  # 0: no text, for training the VQ-VAE.
  image_side: PositiveInt = 448
  mask_side: PositiveInt = 256
  # Masks take this size on the way.
  mask_intermediate_side: PositiveInt | None = 512
  mask_channels: Literal[1, 3] = 1
  max_images: Count = 1  # Images of an example; 0: images are not read.
  max_masks: Count = 1
  pack: PositiveInt = 1  # Examples of a row in training.
  pad_square: bool = False  # Keep the aspect of images and masks.
  # Above 0: in training, images pass through JPEG of a quality drawn from
  # this one to 100.
  jpeg_quality: Annotated[int, Range(0, 100)] = 0
  resize: Literal["pillow", "opencv"] = "pillow"
  seed: Seed = 0  # Of the order and of all random choices.
  workers: Count = 0  # Processes that make batches; 0: threads of this one.
  threads: Count = 4
  prefetch: Count = 8  # Batches made in advance.
  cache: bool = False  # Keep resized images and masks in memory.
  # Tokenize every mask once before the decoder trains, not in every step.
  cache_codes: bool = False
  codes: str = ""  # A file of `argenseg data tokenize` instead.
  # An easier split (of ref_shapes) that the first steps are drawn from.
  warmup_split: str = ""
  warmup_steps: Count = 0
  max_bad_share: Share = 0.1  # Training stops when more records are bad.

  @property
  def tokenized(self) -> bool:
    """Whether the decoder trains on codes, not on masks."""
    return self.cache_codes or bool(self.codes)


# Of `DataConfig`: what does not change what batches hold.
SPEED_KEYS = ("workers", "threads", "prefetch", "cache", "max_bad_share")


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

  # Keys of training/optimizer.OPTIMIZERS.
  name: Literal["adamw", "muon", "adafactor"]
  learning_rate: Positive
  # Peak learning rate of the hidden matrices under Muon, in AdamW's scale.
  muon_learning_rate: Positive
  schedule: Literal["cosine", "linear", "constant"]
  warmup_steps: Count
  end_fraction: Share  # Last learning rate as a share of the peak.
  b1: Decay
  b2: Decay
  eps: Positive
  weight_decay: NonNegative  # Not on norms, biases and other vectors.
  clip_norm: NonNegative  # 0: gradients are not clipped.
  frozen: tuple[str, ...]  # Path prefixes that do not train: "vision.tower".
  ema_decay: Decay  # Of the average of the weights that is kept; 0: none.


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """How the decoder's loss is formed; the defaults are the paper's."""

  # "token": mean over all codes. "scale": mean within each scale, then over
  # the scales, so that the few coarse codes count.
  code_average: Literal["token", "scale"]
  # Share of samples whose scale inputs are zero from a random scale on.
  drop_scale_inputs: Share
  z_loss: NonNegative
  # Of `linear_cross_entropy`; "auto" is the platform's own. An explicit choice
  # that cannot run fails. "reference" keeps all logits.
  implementation: Literal["auto", "reference", "xla", "tpu", "gpu"]


@dataclasses.dataclass(frozen=True)
class TokenizerTrainingConfig:
  """What training an image tokenizer from scratch on masks needs."""

  reconstruction: Literal["mse", "bce_dice"]
  warm_start_steps: Count  # Steps without the quantizer.
  kmeans_iterations: Count  # Of the codebook's start; 0 keeps the random one.
  # Masks whose latents the start and the prior see.
  kmeans_seg_masks: PositiveInt
  revive_every: Count  # Steps between revivals of dead codes; 0 never.
  revive_until: Count  # No revival after this step.
  # Entropy constraint: codes cost -weight * log(frequency in their scale),
  # counted anew every so many steps (0: never) from a step on, and at the end.
  entropy_weight: NonNegative
  entropy_from: Count
  entropy_every: Count


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one axis may be -1 (what is left)."""

  data: AxisSize
  fsdp: AxisSize
  tensor: AxisSize


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length, logging, saving and precision of a run."""

  steps: PositiveInt
  global_batch_size: PositiveInt
  accumulate_steps: PositiveInt  # Turns in which a batch is worked through.
  log_every: Count  # 0: nothing is logged.
  eval_every: Count  # 0: only at the end.
  save_every: Count  # 0: only at the end.
  keep: PositiveInt  # Checkpoints kept; the newest ones.
  max_skipped: Count  # Steps in a row without a finite loss; 0: any number.
  compute_dtype: Literal["float32", "bfloat16"]
  param_dtype: Literal["float32", "bfloat16"]
  # Keys of models/remat.POLICIES.
  remat: Literal[
    "full",
    "offload",
    "attention",
    "mlp_inputs",
    "all_but_mlp",
    "dots",
    "none",
  ]
  keep_every: Count  # Checkpoints of every so many steps are kept too.
  keep_best: Count  # And so many of the best ones,
  best_by: Literal["loss", "ciou"]  # lowest loss or highest cIoU.
  # SIGTERM ends a run wherever it is after so many seconds; 0: it may finish
  # what it does.
  grace_seconds: NonNegative
  # A step that takes this many times the median gets its stacks written.
  stall_factor: NonNegative  # 0: none does.
  # The first and the last step that a trace is of; (): no trace. Checkpoints of
  # earlier versions have neither key.
  profile_steps: tuple[PositiveInt, ...] = ()
  # Which processes of several write one.
  profile_processes: Literal["first", "all"] = "first"


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """Where metrics go beside `metrics.jsonl`."""

  # Keys of runtime/metric_writer.TRACKERS.
  trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
  wandb_project: str = "argenseg_jax"
  wandb_mode: Literal["offline", "online"] = "offline"  # Online sends them.


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What is measured during and after training."""

  splits: tuple[str, ...]
  max_samples: Count  # Per split; 0 takes all.
  batch_size: PositiveInt
  max_text: PositiveInt  # Text tokens of an answer.
  max_masks: PositiveInt
  start_with_mask: bool  # Force `<ge_start>` instead of letting text decide.


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Low-rank adapters for the decoder's task, see `models/lora.py`."""

  rank: Count  # 0: no adapters, the weights themselves train.
  alpha: Positive  # Adapters count alpha / rank times.
  # Patterns of projections: "llm.layers.attention.*".
  targets: tuple[str, ...]
  # Patterns of parameters that train in full beside them: "vision.connector".
  train: tuple[str, ...]
  # How everything else, which stands still, is kept.
  base: Literal["float32", "bfloat16", "int8"]


# Of a task and of its group of keys.
TaskName = Literal["vqvae", "mllm", "rl"]


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """How one task trains."""

  optimizer: OptimizerConfig
  train: TrainConfig

  @property
  def num_updates(self) -> int:
    """Updates of the weights in the whole run."""
    return self.train.steps

  @property
  def keeps_start(self) -> bool:
    """Whether the weights that training started from are kept beside it."""
    return False

  @property
  def sequences_per_row(self) -> int:
    """What the language model reads in an update, for each row of a batch."""
    return 1


@dataclasses.dataclass(frozen=True)
class RLConfig(StageConfig):
  """How answers are sampled and rewarded, and how they move the model."""

  group_size: Annotated[int, Range(2)]  # Sampled answers to each request.
  # The answer's text is given up to its mask; only codes are sampled.
  given_text: bool
  text_temperature: NonNegative  # 0: the likeliest words, which do not train.
  text_top_k: Count  # 0: from all words.
  code_temperature: NonNegative  # 0: the likeliest codes, likewise.
  code_top_k: Count  # 0: from all codes.
  # Keys of training/rewards.REWARDS or "module:function", and what each is
  # multiplied by; no weights: all by 1.
  rewards: tuple[str, ...]
  reward_weights: tuple[NonNegative, ...]
  normalize: bool  # Advantages are divided by their group's deviation.
  clip: Annotated[float, Range(0, 1, above=True)]  # Of probability ratios.
  kl: NonNegative  # Reward that a nat away from the start costs; 0: none.
  updates: PositiveInt  # Of the weights, for each batch of answers.
  text_weight: NonNegative  # Of a word's gradient.
  scale_weights: tuple[NonNegative, ...]  # Of a code's, by scale; (): all 1.

  @property
  def num_updates(self) -> int:
    return self.train.steps * self.updates

  @property
  def keeps_start(self) -> bool:
    return self.kl > 0

  @property
  def sequences_per_row(self) -> int:
    return self.group_size


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything that defines a training run.

  The tasks run in order, each in its own folder of the work directory, and
  start from what was trained just before: the decoder from its image tokenizer,
  "rl" from the whole model.
  """

  tasks: tuple[TaskName, ...]
  seed: Seed
  init_from: str | None  # Checkpoint of a whole model or an image tokenizer.
  model: ModelChoice
  data: DataConfig
  vqvae: StageConfig
  mllm: StageConfig
  rl: RLConfig
  loss: LossConfig
  lora: LoRAConfig
  tokenizer_training: TokenizerTrainingConfig
  mesh: MeshConfig
  eval: EvalConfig
  # Checkpoints of earlier versions do not have it.
  tracking: TrackingConfig = TrackingConfig()

  def adapters(self, task: str) -> LoRAConfig | None:
    """Settings of the adapters that a task trains instead of the weights."""
    return self.lora if self.lora.rank and task != "vqvae" else None

  def stage(self, task: str) -> StageConfig:
    """The settings of one of `tasks`."""
    return getattr(self, task)
