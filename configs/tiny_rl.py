"""The quickstart's model, trained once more on the IoU of its own answers.

`--config.init_from` names the quickstart's decoder (runs/quickstart/mllm) and
`--config.data.path` its data. These numbers are not tuned: docs/lab/rl.md says
what was tried.
"""

from ml_collections import ConfigDict

from argenseg_jax.configs import tiny


def get_config() -> ConfigDict:
  c = tiny.get_config()
  c.tasks = ("rl",)
  c.data.sequence_length = 184  # Prompt, `eval.max_text` and codes.
  c.rl.train.compute_dtype = "float32"
  c.rl.train.remat = "none"
  c.rl.train.steps = 300
  c.rl.train.global_batch_size = 16
  c.rl.train.eval_every = 100
  c.rl.train.save_every = 50
  c.rl.optimizer.learning_rate = 3e-5
  c.rl.optimizer.b2 = 0.98
  c.rl.optimizer.frozen = ("vqvae",)
  c.rl.kl = 0.005
  return c
