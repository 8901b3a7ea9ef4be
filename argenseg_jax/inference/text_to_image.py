"""Images for texts: the mask path without an input image, with guidance."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from argenseg_jax import checkpoint, sharding
from argenseg_jax.config import DataConfig
from argenseg_jax.config_parsing import from_mapping
from argenseg_jax.data import chat
from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.generate import generate
from argenseg_jax.inference.prompts import left_pad
from argenseg_jax.inference.segment import to_uint8
from argenseg_jax.models.argenseg import ARGenSeg


def draw_images(
  loaded: checkpoint.Loaded, texts: Sequence[str], *, guidance: float
) -> tuple[UInt8[np.ndarray, "b h w 3"], UInt8[np.ndarray, "b k h w 3"]]:
  """Images that a model draws, and what they are after each scale.

  Args:
    loaded: a checkpoint of a whole model.
    texts: what to draw, one each.
    guidance: strength at the last scale (0 at the first): how far predictions
      move away from those for an empty text; 0 runs no such twins.

  Raises:
    CheckpointError: it holds an image tokenizer only.
  """
  if not isinstance(loaded.model, ARGenSeg):
    raise checkpoint.CheckpointError(
      f"checkpoint {loaded.path} contains an image tokenizer only; give one of "
      "a whole model."
    )
  data = from_mapping(DataConfig, loaded.meta["run"]["data"])
  tokenizer = checkpoint.text_tokenizer(loaded)
  twins = [""] * len(texts) if guidance else []
  prompts = [_prompt(tokenizer, data, words) for words in (*texts, *twins)]
  tokens, valid = left_pad(prompts, tokenizer.token_ids.pad)
  loaded.model.prepare_to_generate()
  graph, state = nnx.split(loaded.model)

  @sharding.jit
  def run(state, tokens, valid):
    model = nnx.merge(graph, state)
    model.prepare_to_generate()
    found = generate(
      model,
      GenerationOptions(
        max_text=1,
        start_with_mask=True,
        stop_after_masks=True,
        guidance=float(guidance) or None,
      ),
      tokens=tokens,
      valid=valid,
      vision=None,
    )
    codes = found.codes[: len(texts), 0]
    return to_uint8(model.vqvae.decode_prefixes(codes))

  stages = jax.device_get(run(state, jnp.asarray(tokens), jnp.asarray(valid)))
  return stages[:, -1], stages


def _prompt(tokenizer, data: DataConfig, words: str) -> np.ndarray:
  asked = chat.request_text("generation", [words])
  prompt = chat.chat_prompt(
    tokenizer,
    [{"from": "human", "value": asked}],
    system_message=data.system_message,
  )
  return chat.encode_prompt(tokenizer, prompt)
