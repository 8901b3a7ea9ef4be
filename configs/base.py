"""Every key of a run: meaning, unit and range. Other configs change some.

The values here are the paper's where the paper has one (joint training of
ARGenSeg-8B); `data.path` must be set. Numbers out of their range are refused
when the config is read; where 0 switches something off, the comment says so.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  # What to train, in order: "vqvae" (the image tokenizer), "mllm" (the rest),
  # "rl" (the rest once more, by the IoU of its own answers: docs/rl.md).
  c.tasks = ("mllm",)
  c.seed = 0  # Of initial weights and of noise in training; 0 to 2**31 - 1.
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
  c.data.root = ""  # Where images are; "": where the layout has them.
  c.data.split = "train"  # Where the layout has splits.
  # A tokenizer.json; "": that of a whole model in `init_from`, else the shipped
  # small one.
  c.data.text_tokenizer = ""
  # Template: a key of REQUEST_TEMPLATES in argenseg_jax/data/text.py.
  c.data.request = "referring"
  # Ask for a mask by a "point" or "box" of it in words, or by a "drawn_point"
  # or "drawn_box" on its image; "": by its expressions.
  c.data.interactive = ""
  # How a request joins expressions: as in "training" or in "evaluation".
  c.data.join = "training"
  c.data.protocol = "merged"  # All expressions, or "per_expression": one.
  # What the model learns to say; "{description}" stands for the source's words.
  c.data.answer = "Sure, the segmentation result: <mask>."
  c.data.absent_answer = "There is no such thing."  # To what is not there.
  c.data.system_message = ""  # "" leaves the system block out.
  # Tokens of a row: text, image and masks; 0: no text, for image tokenizers.
  c.data.sequence_length = 8192
  c.data.image_side = 448  # Pixels; the vision tower's.
  c.data.mask_side = 256  # Pixels; the image tokenizer's.
  c.data.mask_intermediate_side = 512  # Pixels, on the way; 0: no such step.
  c.data.mask_channels = 1  # 1 for masks, 3 for images as targets.
  c.data.max_images = 1  # Most images of an example; 0: images are not read.
  c.data.max_masks = 1  # Most masks of an example, 0 or more.
  # Examples in one row of the decoder's batches, each blind to the others.
  c.data.pack = 1
  c.data.pad_square = False  # Keep the aspect of images and masks.
  # Above 0, up to 100: in training, images pass through JPEG of a quality drawn
  # from this one to 100.
  c.data.jpeg_quality = 0
  c.data.resize = "pillow"  # Exact for released weights; "opencv" is faster.
  c.data.seed = 0  # Of order and choice of expressions; 0 to 2**31 - 1.
  c.data.workers = 0  # Processes of each host that make batches; 0: threads.
  # Threads of each process that makes batches; 0: none of their own.
  c.data.threads = 4
  c.data.prefetch = 8  # Batches made in advance; 0: none.
  c.data.cache = False  # Keep resized images and masks in memory.
  # Tokenize every mask once before the decoder trains, not in every step (where
  # a source asks for one of several masks at each visit, in every step still).
  c.data.cache_codes = False
  c.data.codes = ""  # A file of `argenseg data tokenize`, to be used instead.
  # An easier split (of ref_shapes) that the decoder's first steps draw from.
  c.data.warmup_split = ""
  c.data.warmup_steps = 0  # Steps that draw from it; 0: none.
  c.data.max_bad_share = 0.1  # 0 to 1: training stops when more are unreadable.

  c.vqvae = _stage(learning_rate=1e-4, steps=100_000, batch=256)
  c.mllm = _stage(learning_rate=4e-5, steps=12_900, batch=128)
  c.mllm.optimizer.warmup_steps = 387  # 3 % of the steps.
  c.mllm.optimizer.weight_decay = 0.05  # As below.
  # Paths of parts that do not train.
  c.mllm.optimizer.frozen = ("vision.tower", "vqvae")

  c.rl = _stage(learning_rate=1e-6, steps=1_000, batch=64)
  c.rl.optimizer.schedule = "constant"  # As below.
  c.rl.optimizer.warmup_steps = 10  # Updates.
  c.rl.optimizer.frozen = ("vision.tower", "vqvae")  # As above.
  c.rl.train.best_by = "ciou"  # Rewards are of sampled answers.
  # A step samples so many answers, 2 or more, to each of its
  # `train.global_batch_size` requests. Texts have up to `eval.max_text` tokens.
  c.rl.group_size = 8
  # Give the answer's text up to its mask, and sample only codes.
  c.rl.given_text = False
  # Words are drawn at this temperature; 0: the likeliest, which do not train.
  c.rl.text_temperature = 1.0
  c.rl.text_top_k = 0  # From so many likeliest words; 0: from all.
  c.rl.code_temperature = 1.0  # Likewise for codes.
  c.rl.code_top_k = 0  # Likewise.
  # What an answer is worth: the sum of "iou", "boundary", "format" or functions
  # of your own ("module:function"), each times its weight (none: times 1).
  c.rl.rewards = ("iou",)
  c.rl.reward_weights = ()  # 0 or more each.
  # Divide a group's advantages by their standard deviation.
  c.rl.normalize = True
  # Ratios of probabilities beyond 1 - clip and 1 + clip gain nothing; above 0,
  # up to 1. It matters from the second update on.
  c.rl.clip = 0.2
  # Reward that a nat away from the start costs, for a whole answer. Above 0 a
  # copy of the weights that train is kept, in the compute dtype; 0: none.
  c.rl.kl = 0.001
  c.rl.updates = 1  # Updates of the weights by each batch of answers.
  c.rl.text_weight = 1.0  # Of words in the gradient, 0 or more.
  # Of codes, one for each scale: (1, 1, 0.5, 0.25); (): 1 each.
  c.rl.scale_weights = ()

  c.loss = ConfigDict()
  # Codes averaged over tokens (the paper) or per "scale", then over scales.
  c.loss.code_average = "token"
  # Share of masks, 0 to 1, whose scale inputs are zero from a random scale on.
  c.loss.drop_scale_inputs = 0.0
  c.loss.z_loss = 0.0  # Weight of the squared log of the normalizer; 0: none.
  # "xla", "tpu" or "gpu" kernels, or the plain "reference"; see kernels/.
  c.loss.implementation = "auto"

  c.tokenizer_training = ConfigDict()
  c.tokenizer_training.reconstruction = "mse"  # Or "bce_dice" for masks.
  c.tokenizer_training.warm_start_steps = 0  # Steps without the quantizer.
  c.tokenizer_training.kmeans_iterations = 0  # 0 keeps the random codebook.
  c.tokenizer_training.kmeans_seg_masks = 1_500  # Masks that it looks at.
  c.tokenizer_training.revive_every = 0  # Steps between revivals; 0: never.
  c.tokenizer_training.revive_until = 0  # The last step that may revive.
  c.tokenizer_training.entropy_weight = 0.0  # 0: plain nearest codes.
  c.tokenizer_training.entropy_from = 0  # Counted from this step on,
  # every so many steps, and at the last one; 0: at the last one only.
  c.tokenizer_training.entropy_every = 100

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
  c.mesh.data = 1  # Splits the batch.
  c.mesh.fsdp = -1  # Splits the batch, parameters and moments.
  c.mesh.tensor = 1  # Splits heads and MLPs.

  c.tracking = ConfigDict()
  # Where metrics go beside metrics.jsonl: "tensorboard", "wandb" (Weights &
  # Biases: pip install wandb).
  c.tracking.trackers = ("tensorboard",)
  c.tracking.wandb_project = "argenseg_jax"  # Of Weights & Biases.
  # "offline": into the work directory only, for `wandb sync`; "online": metrics
  # and config are sent to its server.
  c.tracking.wandb_mode = "offline"

  c.eval = ConfigDict()
  c.eval.splits = ("train",)  # Of `data.path`, where its layout has splits.
  c.eval.max_samples = 0  # Examples of a split; 0 takes all.
  c.eval.batch_size = 16  # Examples at a time, over all devices.
  c.eval.max_text = 32  # Text tokens of an answer, 1 or more.
  c.eval.max_masks = 1  # Masks of an answer, 1 or more.
  c.eval.start_with_mask = False  # True forces a mask and skips the text.
  return c


def _stage(*, learning_rate: float, steps: int, batch: int) -> ConfigDict:
  s = ConfigDict()
  s.optimizer = ConfigDict()
  # "adamw"; "muon": Muon for hidden matrices and AdamW for the rest; or
  # "adafactor", with AdamW's settings and a quarter of its moments' bytes.
  s.optimizer.name = "adamw"
  s.optimizer.learning_rate = learning_rate  # AdamW's highest; above 0.
  # Muon's highest, in AdamW's scale; above 0.
  s.optimizer.muon_learning_rate = 6e-3
  s.optimizer.schedule = "cosine"  # Or "linear", "constant".
  s.optimizer.warmup_steps = 100  # Of a linear rise; 0: none.
  s.optimizer.end_fraction = 0.0  # Last rate as a share of the peak, 0 to 1.
  s.optimizer.b1 = 0.9  # Decay of the first moment, 0 or more and below 1.
  s.optimizer.b2 = 0.999  # Of the second, likewise.
  s.optimizer.eps = 1e-8  # Above 0.
  # A step takes this times the learning rate off each weight; not on norms,
  # biases and other vectors.
  s.optimizer.weight_decay = 0.0
  s.optimizer.clip_norm = 1.0  # Largest norm of a gradient; 0: any.
  s.optimizer.frozen = ()  # Paths of parts that do not train.
  # Above 0 and below 1, checkpoints and evaluation get an average of the
  # weights that decays so; 0: the weights themselves.
  s.optimizer.ema_decay = 0.0
  s.train = ConfigDict()
  s.train.steps = steps  # Updates of the weights.
  s.train.global_batch_size = batch  # Rows of a step, over all devices.
  # Microbatches of a step: less memory, the same result.
  s.train.accumulate_steps = 1
  s.train.log_every = 10  # Steps; 0: nothing is logged.
  s.train.eval_every = 0  # Steps; 0: only at the end.
  s.train.save_every = 500  # Steps; 0: only at the end.
  s.train.keep = 2  # Newest checkpoints kept, 1 or more.
  s.train.keep_every = 0  # Those of every so many steps are kept too; 0: none.
  s.train.keep_best = 0  # So many of the best are kept too; 0: none.
  # What is best: the lowest mean "loss" since the save before, or the highest
  # "ciou" of an evaluation at that step (see eval_every).
  s.train.best_by = "loss"
  # Told to stop (SIGTERM, Ctrl-C), a run saves at its next step. Where it
  # cannot, all its processes end after so many seconds and the last checkpoint
  # counts; 0: it finishes what it does. Set it below the time that your
  # scheduler grants.
  s.train.grace_seconds = 30.0
  # A step that takes this many times the median, and a minute, is reported with
  # every thread's stack in stacks.txt; 0: none is.
  s.train.stall_factor = 20.0
  # So many steps in a row without a finite loss, gradient and update end the
  # run; 0: none do.
  s.train.max_skipped = 20
  # (10, 12) writes a trace of steps 10 to 12 for XProf, see docs/pods.md; the
  # first step compiles. (): no trace.
  s.train.profile_steps = ()
  # Which processes of several write one: the "first", or "all".
  s.train.profile_processes = "first"
  s.train.compute_dtype = "bfloat16"  # Or "float32".
  # Of the weights. "bfloat16" takes half of the bytes; updates are then rounded
  # at random, so that small ones count on average. Moments and the average of
  # the weights (ema_decay) are in float32 always.
  s.train.param_dtype = "float32"
  # What the decoder's layers keep for the backward pass, from the least memory
  # to the least work: "full" recomputes all, "attention" keeps attention's
  # results, "mlp_inputs" what the MLPs read too, "all_but_mlp" also queries,
  # keys and values, "dots" all products with weights, "none" everything.
  # "offload" keeps what "all_but_mlp" does, in the host's memory. Numbers stay
  # the same.
  s.train.remat = "full"
  return s
