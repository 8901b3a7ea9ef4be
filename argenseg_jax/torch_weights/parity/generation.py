"""Parity of generation: answers, codes, guidance, images."""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax.inference import generate
from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.segment import to_uint8
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.torch_weights.parity.compare import MARGIN, Check, Golden


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
  """One prompt, or a pair of them under guidance, and its answer, each once.

  Attributes:
    golden: the folder.
    case: name of the prompt.
    graph: of the model.
    state: of the model.
    decode: codes [n] -> partial latents and images after each scale.
  """

  golden: Golden
  case: str
  graph: nnx.GraphDef
  state: nnx.State
  decode: Callable

  @functools.cached_property
  def model(self) -> ARGenSeg:
    """A module that is not run: it knows sizes only."""
    return nnx.merge(self.graph, self.state)

  @property
  def tokens(self) -> np.ndarray:
    return self.golden[f"in.{self.case}.input_ids"]

  @property
  def guidance(self) -> float | None:
    """Its strength, where the prompt is a pair."""
    if len(self.tokens) == 1:
      return None
    return float(self.golden.config.get("cfg", 4.0))

  @property
  def recorded_ids(self) -> np.ndarray:
    return self.golden[f"out.{self.case}.output_ids"]

  @functools.cached_property
  def masks(self) -> list[int]:
    """Numbers of the masks whose codes were recorded."""
    pattern = re.compile(rf"out\.{self.case}\.mask(\d+)\.idx")
    found = map(pattern.fullmatch, self.golden.recorded)
    return sorted(int(m[1]) for m in found if m)

  @property
  def max_masks(self) -> int:
    return int(self.golden[f"out.{self.case}.num_masks"][0]) + 1

  @functools.cached_property
  def recorded_codes(self) -> np.ndarray:
    shape = len(self.tokens), self.max_masks, self.model.scales.num_codes
    codes = np.zeros(shape, np.int32)
    for mask in self.masks:
      codes[:, mask] = self.golden[f"out.{self.case}.mask{mask}.idx"]
    return codes

  def _run(self, given_codes: np.ndarray | None):
    pixels = np.moveaxis(self.golden[f"in.{self.case}.pixel_values"], 1, -1)
    # An answer that was not cut short must also end by itself here.
    ended = self.recorded_ids[0, -1] == self.model.config.token_ids.im_end

    given = None if given_codes is None else jnp.asarray(given_codes)

    @jax.jit
    def run(state):
      model = nnx.merge(self.graph, state)
      out = generate.generate(
        model,
        GenerationOptions(
          max_text=self.recorded_ids.shape[1] + (2 if ended else 0),
          max_masks=self.max_masks,
          guidance=self.guidance,
          collect=True,
        ),
        tokens=jnp.asarray(self.tokens, jnp.int32),
        valid=jnp.asarray(self.golden[f"in.{self.case}.attention_mask"] > 0),
        vision=model.vision_embeddings(jnp.asarray(pixels)[:, None]),
        given_codes=given,
      )
      raw = jnp.einsum("bmnd,vd->bmnv", out.hidden, model.code_head)
      return out, raw

    return run(self.state)

  @functools.cached_property
  def free_running(self):
    """What was generated without help, and logits before any guidance."""
    return self._run(None)

  @functools.cached_property
  def generated(self):
    """Free-running; where a toss-up went the other way, what follows the
    recorded codes: each choice is then judged given those before it."""
    return self._run(self.recorded_codes) if self.tossed else self.free_running

  @functools.cached_property
  def tossed(self) -> bool:
    """Whether codes differ from the recorded ones by a toss-up: of the first
    scale that differs, no code that differs was recorded with a margin."""
    for mask in self.masks:
      differs = np.any(
        self.free_running[0].codes[:, mask] != self.recorded_codes[:, mask], 0
      )
      if not differs.any():
        continue
      level = self.model.scales.scale_of_code
      first = differs & (level == level[np.argmax(differs)])
      name = f"out.{self.case}.mask{mask}.margin"
      if name not in self.golden:
        return True
      return bool(np.all(self.golden[name].reshape(-1)[first] < MARGIN))
    return False

  @functools.cached_property
  def images(self):
    """Of each mask, partial latents and clamped images after each scale."""
    codes = self.generated[0].codes
    return {mask: self.decode(codes[0, mask]) for mask in self.masks}

  @property
  def output_ids(self) -> np.ndarray:
    """As `generate` of the authors returns them: cut after the last token."""
    found = np.asarray(self.generated[0].tokens)
    length = max(np.max(np.sum(found != 0, 1)), self.recorded_ids.shape[1])
    found = found[:, :length]
    if self.guidance is None:
      return found
    # Both rows of a guided pair are given the conditional row's tokens.
    return np.broadcast_to(found[:1], found.shape)

  def raw(self, mask: int) -> jax.Array:
    return self.generated[1][:, mask]

  def guided_logits(self, mask: int) -> jax.Array:
    raw = self.raw(mask)
    if self.guidance is None:
      return raw
    scales = self.model.scales
    ramp = self.guidance * scales.scale_of_code / max(len(scales) - 1, 1)
    ramp = jnp.asarray(ramp, jnp.float32)[None, :, None]
    return (1 + ramp) * raw[:1] - ramp * raw[1:]

  def choices(self, mask: int) -> jax.Array:
    if self.tossed:
      return jnp.argmax(self.guided_logits(mask), -1)
    return self.generated[0].codes[:1, mask]

  def margin(self, mask: int) -> jax.Array:
    top = jax.lax.top_k(self.guided_logits(mask), 2)[0]
    return top[..., 0] - top[..., 1]

  def recorded_margin(self, mask: int) -> np.ndarray | jax.Array:
    name = f"out.{self.case}.mask{mask}.margin"
    return self.golden[name] if name in self.golden else self.margin(mask)

  def latents(self, mask: int) -> jax.Array:
    """[scales 1 c h w]."""
    return jnp.moveaxis(self.images[mask][0], -1, 1)[:, None]


def checks(golden: Golden, case: str, graph, state, decode) -> dict[str, Check]:
  """Checks of one prompt, or of a pair of them under guidance.

  Args:
    golden: the folder.
    case: name of the prompt.
    graph: of the model.
    state: of the model.
    decode: codes [n] -> partial latents and images after each scale.
  """
  answer = Answer(golden, case, graph, state, decode)
  found = {
    f"out.{case}.output_ids": Check(lambda: answer.output_ids),
    f"out.{case}.num_masks": Check(lambda: answer.generated[0].num_masks[:1]),
  }
  for mask in answer.masks:
    prefix = f"out.{case}.mask{mask}."
    found |= {prefix + n: check for n, check in _mask(answer, mask).items()}
  return found


def _mask(answer: Answer, mask: int) -> dict[str, Check]:
  def inputs():
    return answer.generated[0].inputs[:, mask]

  def last_image():
    return answer.images[mask][1][-1]

  return {
    "idx": Check(
      lambda: answer.choices(mask),
      margin=lambda: answer.recorded_margin(mask),
    ),
    "position_ids": Check(lambda: answer.generated[0].positions[:, mask]),
    "first_input": Check(lambda: inputs()[:, :1]),
    "margin": Check(lambda: answer.margin(mask)),
    "f_hat": Check(lambda: answer.latents(mask)),
    "f_hat_final": Check(lambda: answer.latents(mask)[-1]),
    "llm_inputs": Check(inputs),
    "raw_visual_logits": Check(lambda: answer.raw(mask)),
    "raw_logits": Check(lambda: answer.raw(mask)),
    "guided_logits": Check(lambda: answer.guided_logits(mask)),
    "image_float": Check(lambda: jnp.moveaxis(last_image()[None], -1, 1)),
    "image_uint8": Check(lambda: to_uint8(last_image())),
    "multi_uint8": Check(lambda: to_uint8(answer.images[mask][1])),
  }
