"""Every key of a run, with what it means. Other configs change some of them.

The values here are the paper's where the paper has one (joint training of
ARGenSeg-8B); `data.path` must be set.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  # What to train, in order: "vqvae" (the image tokenizer), "mllm" (the rest).
  c.tasks = ("mllm",)
  c.seed = 0
  # Checkpoint to start from: a whole model or an image tokenizer; "" for none.
  c.init_from = ""

  c.model = ConfigDict()
  # See argenseg_jax/variants.py; "" takes the model of `init_from`.
  c.model.variant = "argenseg_8b"
  # Keys of that variant to change: ("llm.num_layers=2",).
  c.model.overrides = ()

  c.data = ConfigDict()
  c.data.source = "jsonl"  # The layout of the path: docs/data.md lists them.
  c.data.path = ""  # The file or folder of that layout.
  c.data.root = ""  # Where pictures are; "": where the layout has them.
  c.data.split = "train"  # Where the layout has splits.
  # A tokenizer.json; "": that of a whole model in `init_from`, else the shipped
  # small one.
  c.data.text_tokenizer = ""
  # Template: a key of REQUEST_TEMPLATES in argenseg_jax/data/text.py.
  c.data.request = "referring"
  # Ask for a mask by a "point" or "box" of it in words, or by a "drawn_point"
  # or "drawn_box" on its picture; "": by its expressions.
  c.data.interactive = ""
  c.data.join = "training"  # How a request joins expressions; or "evaluation".
  c.data.protocol = "merged"  # All expressions, or "per_expression": one.
  c.data.answer = "Sure, the segmentation result: <mask>."
  c.data.absent_answer = "There is no such thing."
  c.data.system_message = ""  # "" leaves the system block out.
  c.data.sequence_length = 8192
  c.data.image_side = 448
  c.data.mask_side = 256
  c.data.mask_intermediate_side = 512  # Masks take this size on the way; 0: no.
  c.data.mask_channels = 1  # 3 for pictures as targets.
  c.data.max_images = 1  # Places for pictures of a sample.
  c.data.max_masks = 1
  # Samples that the decoder trains on in one row, each blind to the others.
  c.data.pack = 1
  c.data.pad_square = False  # Keep the aspect of pictures and masks.
  # Above 0: in training, pictures pass through JPEG of a quality drawn from
  # this one to 100.
  c.data.jpeg_quality = 0
  c.data.resize = "pillow"  # Exact for released weights; "opencv" is faster.
  c.data.seed = 0  # Of the order and the choice of expressions.
  c.data.workers = 0  # Processes that make batches; 0: threads.
  c.data.threads = 4
  c.data.prefetch = 8  # Batches made in advance.
  c.data.cache = False  # Keep resized pictures and masks in memory.
  # Tokenise every mask once before the decoder trains, not in every step.
  c.data.cache_codes = False
  c.data.codes = ""  # A file of `argenseg data tokenize`, to be used instead.
  # An easier split (of ref_shapes) that the decoder's first steps draw from.
  c.data.warmup_split = ""
  c.data.warmup_steps = 0
  c.data.max_bad_share = 0.1  # Training stops when more records are bad.

  c.vqvae = _stage(learning_rate=1e-4, steps=100_000, batch=256)
  c.mllm = _stage(learning_rate=4e-5, steps=12_900, batch=128)
  c.mllm.optimizer.warmup_steps = 387  # 3 %.
  c.mllm.optimizer.weight_decay = 0.05
  # Paths of parts that do not train.
  c.mllm.optimizer.frozen = ("vision.tower", "vqvae")

  c.loss = ConfigDict()
  # Codes averaged over tokens (the paper) or per "scale", then over scales.
  c.loss.code_average = "token"
  # Share of masks whose scale inputs are zero from a random scale on.
  c.loss.drop_scale_inputs = 0.0
  c.loss.z_loss = 0.0
  # "xla", "tpu" or "gpu" kernels, or the plain "reference"; see kernels/.
  c.loss.implementation = "auto"

  c.tokenizer_training = ConfigDict()
  c.tokenizer_training.reconstruction = "mse"  # Or "bce_dice" for masks.
  c.tokenizer_training.warm_start_steps = 0  # Steps without the quantiser.
  c.tokenizer_training.kmeans_iterations = 0  # 0 keeps the random codebook.
  c.tokenizer_training.kmeans_seg_masks = 1_500
  c.tokenizer_training.revive_every = 0  # Steps between revivals; 0 never.
  c.tokenizer_training.revive_until = 0
  c.tokenizer_training.entropy_weight = 0.0  # 0: plain nearest codes.
  c.tokenizer_training.entropy_from = 0  # Counted from this step on,
  c.tokenizer_training.entropy_every = 100  # every so many steps.

  # Adapters (low-rank updates of frozen weights) for the decoder's task.
  c.lora = ConfigDict()
  c.lora.rank = 0  # Of each adapter; 0: no adapters, the weights train.
  c.lora.alpha = 32.0  # Adapters count alpha / rank times.
  # Projections that get one, by pattern: * stands for anything.
  c.lora.targets = ("llm.layers.attention.*", "llm.layers.mlp.*")
  # What trains in full beside them, by pattern: ("vision.connector",).
  c.lora.train = ()
  # How the frozen base is kept: "bfloat16", "float32", or "int8" (the decoder's
  # matrices in eight bits, everything else in bfloat16).
  c.lora.base = "bfloat16"

  c.mesh = ConfigDict()  # Devices along each axis; one may be -1: the rest.
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.mesh.tensor = 1

  c.eval = ConfigDict()
  c.eval.splits = ("train",)  # Of `data.path`, where its layout has splits.
  c.eval.max_samples = 0  # A split; 0 takes all.
  c.eval.batch_size = 16
  c.eval.max_text = 32  # Text tokens of an answer.
  c.eval.max_masks = 1
  c.eval.start_with_mask = False  # True forces a mask and skips the text.
  return c


def _stage(*, learning_rate: float, steps: int, batch: int) -> ConfigDict:
  s = ConfigDict()
  s.optimizer = ConfigDict()
  # "adamw", or "muon": Muon for hidden matrices and AdamW for the rest.
  s.optimizer.name = "adamw"
  s.optimizer.learning_rate = learning_rate  # AdamW's highest.
  s.optimizer.muon_learning_rate = 6e-3  # Muon's highest, in AdamW's scale.
  s.optimizer.schedule = "cosine"  # Or "linear", "constant".
  s.optimizer.warmup_steps = 100
  s.optimizer.end_fraction = 0.0  # Last learning rate as a share of the peak.
  s.optimizer.b1 = 0.9
  s.optimizer.b2 = 0.999
  s.optimizer.eps = 1e-8
  s.optimizer.weight_decay = 0.0  # Not on norms, biases and other vectors.
  s.optimizer.clip_norm = 1.0
  s.optimizer.frozen = ()
  # Above 0, checkpoints and evaluation get an average of the weights.
  s.optimizer.ema_decay = 0.0
  s.train = ConfigDict()
  s.train.steps = steps
  s.train.global_batch_size = batch
  # Turns in which a batch is worked through: less memory, the same result.
  s.train.accumulate_steps = 1
  s.train.log_every = 10
  s.train.eval_every = 0  # 0: only at the end.
  s.train.save_every = 500
  s.train.keep = 2  # Newest checkpoints kept.
  s.train.keep_every = 0  # Those of every so many steps are kept too; 0: none.
  s.train.keep_best = 0  # So many of the best are kept too.
  # What is best: the lowest mean "loss" since the save before, or the highest
  # "ciou" of an evaluation at that step (see eval_every).
  s.train.best_by = "loss"
  # Told to stop (SIGTERM), a run saves at its next step. Where it cannot, all
  # its processes end after so many seconds and the last checkpoint counts; 0:
  # it finishes what it does. Set it below the time that your scheduler grants.
  s.train.grace_seconds = 30.0
  # A step that takes this many times the median, and a minute, is reported with
  # every thread's stack in stacks.txt; 0: none is.
  s.train.stall_factor = 20.0
  # So many steps in a row without a finite loss or gradient end the run.
  s.train.max_skipped = 20
  s.train.compute_dtype = "bfloat16"
  s.train.param_dtype = "float32"
  s.train.remat = "full"  # What is recomputed: "none", "dots", "full".
  return s
