"""The quickstart's model on ref_shapes: minutes on a laptop's CPU.

The decoder's recipe is in docs/quickstart.md; what differs from the paper's is
what makes a small model look at the image.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import base


def get_config() -> ConfigDict:
  c = base.get_config()
  c.tasks = ("vqvae", "mllm")
  c.model.variant = "tiny"

  c.data.source = "ref_shapes"
  c.data.request = "free"
  c.data.protocol = "per_expression"
  c.data.answer = "the {description}<mask>"
  c.data.sequence_length = 174
  c.data.image_side = 64
  c.data.mask_side = 64
  c.data.mask_intermediate_side = 0
  c.data.resize = "opencv"
  c.data.cache = True
  c.data.cache_codes = True
  c.data.threads = 1
  c.data.warmup_split = "single"
  c.data.warmup_steps = 250

  for stage in (c.vqvae, c.mllm):
    stage.train.compute_dtype = "float32"
    stage.train.remat = "none"
    stage.optimizer.b2 = 0.98

  c.vqvae.optimizer.learning_rate = 2e-3
  c.vqvae.train.steps = 850
  c.vqvae.train.global_batch_size = 32
  c.tokenizer_training.reconstruction = "bce_dice"
  c.tokenizer_training.warm_start_steps = 80
  c.tokenizer_training.kmeans_iterations = 10
  c.tokenizer_training.kmeans_seg_masks = 256
  c.tokenizer_training.revive_every = 20
  c.tokenizer_training.revive_until = 500
  c.tokenizer_training.entropy_weight = 0.4
  c.tokenizer_training.entropy_from = 240

  c.mllm.optimizer.learning_rate = 2e-3
  c.mllm.optimizer.name = "muon"
  c.mllm.optimizer.warmup_steps = 100
  c.mllm.optimizer.weight_decay = 0.05
  c.mllm.optimizer.frozen = ("vqvae",)
  c.mllm.train.steps = 4000
  c.mllm.train.global_batch_size = 16
  c.mllm.train.eval_every = 1000
  c.loss.code_average = "scale"
  c.loss.drop_scale_inputs = 0.4

  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.eval.splits = ("val", "testA", "testB")
  c.eval.max_text = 12
  return c
