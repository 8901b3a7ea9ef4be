"""A tiny model, requests and settings for the task `rl`."""

import functools

import jax
import numpy as np
import tiny_model
from flax import nnx

from argenseg_jax.config import RunConfig
from argenseg_jax.config_parsing import replace, run_config
from argenseg_jax.configs import tiny
from argenseg_jax.training import rl, rollouts
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET, Batch

IDS = tiny_model.TOKEN_IDS
ROWS, LENGTH, CODES, WORDS = 8, 37, 21, 4
VARIANT = dict(
  aligned_positions=True,
  bidirectional_prompt=True,
  full_attention_in_scale=True,
)


def make_config(**changes) -> RunConfig:
  values = tiny.get_config()
  values.data.path = "unused"
  values.data.sequence_length = LENGTH
  values.eval.max_text = WORDS
  values.rl.train.global_batch_size = ROWS
  values.rl.train.compute_dtype = "float32"
  values.rl.train.remat = "none"
  values.rl.kl = 0.0
  return replace(run_config(values), changes)


@functools.cache
def make_model():
  return tiny_model.model(**VARIANT)


def make_batch() -> Batch:
  """Prompts of unequal lengths; the last two rows ask for something absent,
  row 5 has no weight."""
  rng = np.random.default_rng(0)
  tokens = np.zeros((ROWS, LENGTH), np.int32)
  targets = np.full((ROWS, LENGTH), IGNORE_TARGET, np.int32)
  is_prompt = np.zeros((ROWS, LENGTH), bool)
  for i in range(ROWS):
    prompt, said = 7 + i % 3, 1 + i % 2
    tokens[i, :prompt] = rng.integers(10, 20, prompt)
    tokens[i, 1:5] = IDS.img_context
    is_prompt[i, :prompt] = True
    answer = [12] * said + [IDS.ge_start] + [IDS.mask_context] * (CODES - 1)
    answer += [IDS.ge_end]
    if i >= ROWS - 2:
      answer = [13] * said
    answer += [IDS.im_end]
    end = prompt + len(answer)
    tokens[i, prompt:end] = answer
    due = np.array(answer)
    code = (due == IDS.mask_context) | (due == IDS.ge_end)
    targets[i, prompt - 1 : end - 1] = np.where(code, CODE_TARGET, due)
  used = np.cumsum(tokens[:, ::-1] != 0, 1)[:, ::-1] > 0
  seg_masks = np.zeros((ROWS, 1, 16, 16, 1), np.uint8)
  seg_masks[:-2, :, 4:12, 4:14] = 255
  weight = np.ones(ROWS, np.float32)
  weight[5] = 0
  return Batch(
    tokens=tokens,
    targets=targets,
    positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)) * used,
    segment_ids=used.astype(np.int32),
    is_prompt=is_prompt,
    images=rng.integers(0, 256, (ROWS, 1, 16, 16, 3)).astype(np.uint8),
    seg_masks=seg_masks,
    mask_valid=np.arange(ROWS)[:, None] < ROWS - 2,
    codes=np.zeros((ROWS, 1, 0), np.int32),
    sample_weight=weight,
    sample_id=np.arange(ROWS),
  )


@functools.cache
def sampler(config: RunConfig):
  """(state, batch, key) -> rollout, what generation says of its codes, and
  their log-probabilities under the same weights."""
  graph = nnx.split(make_model())[0]

  @jax.jit
  def run(state, batch, key):
    def model():
      return nnx.merge(graph, state)

    lead = rollouts.leads(batch, config, model())
    drawn = rollouts.answer(model(), batch, lead, config, key)
    rollout = rollouts.judged(model(), batch, lead, config, drawn)
    scored = rl.log_probs(model(), batch, config, rollout)
    return rollout, drawn.log_probs[:, 0], scored

  return run


def sampled(config: RunConfig):
  state = nnx.split(make_model())[1]
  return sampler(config)(state, make_batch(), jax.random.key(3))
