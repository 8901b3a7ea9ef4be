"""Parity of the whole model: teacher-forced training cases and generation."""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.models import losses
from argenseg_jax.models.argenseg import ARGenSeg, normalize_seg_masks
from argenseg_jax.torch_weights import recognize, rules
from argenseg_jax.torch_weights.parity import generation
from argenseg_jax.torch_weights.parity.compare import (
  Check,
  Golden,
  gradient_checks,
  torch_gradients,
)
from argenseg_jax.torch_weights.parity.vqvae import margins
from argenseg_jax.torch_weights.tables import Table
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET, ModelInputs

_IGNORE_LABEL = -100


def checks(golden: Golden) -> dict[str, Check]:
  """One check for every array that this kind of folder may hold."""
  config = recognize.whole_config(golden.config, golden.weights, None)
  table = rules.argenseg(config)
  graph, state = golden.load(
    lambda: ARGenSeg(config, rngs=construct.Rngs(0)), table
  )

  # One mask or image at a time: the same two programs serve all cases.
  @jax.jit
  def encode_one(state, seg_mask, codes):
    """The choice of each code given the recorded coarser ones, how narrow it
    was, and the next-scale inputs of the recorded codes."""
    vqvae = nnx.merge(graph, state).vqvae
    latent = vqvae.encode_latent(seg_mask[None])
    gaps, choices = margins(vqvae.quantizer, latent, codes[None])
    return choices[0], gaps[0], vqvae.quantizer.scale_inputs(codes[None])[0]

  @jax.jit
  def decode_one(state, codes):
    vqvae = nnx.merge(graph, state).vqvae
    prefixes = vqvae.quantizer.prefixes(codes[None])
    return prefixes[0], vqvae.decode_prefixes(codes[None])[0]

  encode = functools.partial(encode_one, state)
  decode = functools.partial(decode_one, state)
  found = {}
  for name in golden.arrays:
    match = re.fullmatch(r"in\.(\w+)\.(labels|input_ids)", name)
    if match and match[2] == "labels":
      case = Case(golden, match[1], graph, state, table, encode)
      found |= _training(case)
    elif match and f"in.{match[1]}.labels" not in golden:
      found |= generation.checks(golden, match[1], graph, state, decode)
  return found


def per_row(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Deals `values` [n ...] out to rows, `counts` to each, zeros behind."""
  rows = np.zeros((len(counts), max(counts.max(), 1), *values.shape[1:]))
  start = 0
  for row, count in enumerate(counts):
    rows[row, :count] = values[start : start + count]
    start += count
  return rows.astype(values.dtype)


def as_recorded_from_bytes(pixels: np.ndarray) -> jax.Array:
  """Masks [... h w 3] in [-1, 1] as the model's own normalization makes them
  of the bytes they were recorded from; others as they are."""
  of_bytes = np.rint((pixels + 1) * 127.5)
  if np.abs(of_bytes / 127.5 - 1 - pixels).max(initial=0.0) > 1e-6:
    return jnp.asarray(pixels)
  return normalize_seg_masks(jnp.asarray(of_bytes.astype(np.uint8)))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A teacher-forced batch, and what this code makes of it, each once.

  Attributes:
    golden: the folder.
    name: of the case.
    graph: of the model.
    state: of the model.
    table: names of its tensors.
    encode: a mask and its recorded codes -> choices, margins and next-scale
      inputs.
  """

  golden: Golden
  name: str
  graph: nnx.GraphDef
  state: nnx.State
  table: Table
  encode: Callable

  def given(self, name: str) -> np.ndarray:
    return self.golden[f"in.{self.name}.{name}"]

  @functools.cached_property
  def model(self) -> ARGenSeg:
    """A module that is not run: it knows sizes only."""
    return nnx.merge(self.graph, self.state)

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    return self.given("input_ids").astype(np.int32)

  @functools.cached_property
  def labels(self) -> np.ndarray:
    return self.given("labels").astype(np.int32)

  @functools.cached_property
  def valid(self) -> np.ndarray:
    return self.given("attention_mask").astype(np.int32)

  @functools.cached_property
  def pixels(self) -> np.ndarray:
    """[images h w 3] of all rows, as the recorder normalized them."""
    return np.moveaxis(self.given("pixel_values"), 1, -1)

  @functools.cached_property
  def targets(self) -> np.ndarray:
    """What each position is to predict, as `types.Batch` has it."""
    ids = self.model.config.token_ids
    due = np.where(self.labels == ids.mask_context, CODE_TARGET, self.labels)
    due = np.where(due == _IGNORE_LABEL, IGNORE_TARGET, due)
    return np.pad(due[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_TARGET)

  @functools.cached_property
  def row_images(self) -> np.ndarray:
    """[b i h w 3]: the images that count, dealt out to their rows."""
    config = self.model.config
    context = np.sum(self.tokens == config.token_ids.img_context, 1)
    counts = context // config.vision.num_embeddings
    return per_row(self.pixels[self.given("image_flags") > 0], counts)

  @functools.cached_property
  def row_masks(self) -> np.ndarray:
    """[b m]: each row's places among all masks; rows with fewer masks repeat
    the first."""
    ids = self.model.config.token_ids
    slots = self.model.scales.num_codes - 1
    if slots:
      counts = np.sum(self.tokens == ids.mask_context, 1) // slots
    else:
      counts = np.sum(self.tokens == ids.ge_start, 1)
    return per_row(np.flatnonzero(self.given("mask_flags") > 0), counts)

  @functools.cached_property
  def recorded_codes(self) -> jax.Array:
    return jnp.asarray(
      self.golden[f"out.{self.name}.mask_token_ids"], jnp.int32
    )

  @functools.cached_property
  def encoded(self) -> tuple[jax.Array, ...]:
    """Choices, margins and next-scale inputs of all masks."""
    seg_masks = as_recorded_from_bytes(np.moveaxis(self.given("masks"), 1, -1))
    parts = map(self.encode, seg_masks, self.recorded_codes)
    return tuple(map(jnp.stack, zip(*parts, strict=True)))

  def _forward(self, params, rest, codes, inputs):
    """Total loss, and what else the recorder kept."""
    model = nnx.merge(self.graph, params, rest)
    model_inputs = ModelInputs(
      tokens=jnp.asarray(self.tokens),
      positions=jnp.asarray(self.given("position_ids"), jnp.int32),
      segment_ids=jnp.asarray(self.valid),
      is_prompt=jnp.zeros(self.tokens.shape, bool),
      images=jnp.asarray(self.row_images),
      scale_inputs=inputs[self.row_masks],
    )
    hidden = model(model_inputs)
    resolved, code_index = losses.resolve_targets(
      jnp.asarray(self.targets),
      codes[self.row_masks],
      model.config.token_ids.first_code,
    )
    sums = losses.decoder_loss(
      hidden,
      model.llm.head,
      resolved,
      code_index,
      jnp.ones(len(self.tokens)),
      scales=model.scales,
    )
    text, code = sums.means()
    return text + code, {
      "text": text,
      "code": code,
      "resolved": resolved,
      "logits": hidden @ model.llm.head.T,
      "vision": model.vision(jnp.asarray(self.pixels)),
    }

  @functools.cached_property
  def trained(self):
    """What the recorder kept, and gradients by PyTorch name."""
    # The image tokenizer is frozen in the recorder's training, too.
    params, rest = nnx.split_state(
      self.state, lambda path, leaf: path[0] != "vqvae", ...
    )
    run = jax.jit(jax.value_and_grad(self._forward, has_aux=True))
    (loss, values), gradients = run(
      params, rest, self.recorded_codes, self.encoded[2]
    )
    zeros = jax.tree.map(jnp.zeros_like, rest)
    whole = nnx.merge_state(gradients, zeros)
    found = torch_gradients(self.table, whole)
    found = {
      n: g for n, g in found.items() if not n.startswith("image_tokenizer.")
    }
    return values | {"loss": loss}, found

  def value(self, name: str) -> jax.Array:
    return self.trained[0][name]

  @property
  def logits(self) -> np.ndarray:
    return np.where(self.valid[:, :, None] > 0, self.value("logits"), 0.0)

  @property
  def final_labels(self) -> np.ndarray:
    """Codes in place of the marks, before the shift."""
    final = self.labels.copy()
    resolved = np.asarray(self.value("resolved"))[:, :-1]
    final[:, 1:] = np.where(
      self.labels[:, 1:] == _IGNORE_LABEL, _IGNORE_LABEL, resolved
    )
    return final

  def label_logit(self) -> np.ndarray:
    index = np.maximum(self.final_labels[:, 1:], 0)
    return np.take_along_axis(
      np.asarray(self.value("logits"))[:, :-1], index[:, :, None], 2
    )[:, :, 0]

  def argmax_margin(self) -> np.ndarray:
    top = jax.lax.top_k(self.value("logits"), 2)[0]
    return np.asarray(top[..., 0] - top[..., 1])


def _training(case: Case) -> dict[str, Check]:
  prefix = f"out.{case.name}."

  def everywhere(name, compute, step=1):
    """A check of an array whose padded positions, which mean nothing and which
    the recorder did not clear, are taken as recorded."""

    def filled():
      recorded = case.golden[prefix + name]
      real = case.valid[:, ::step][:, : recorded.shape[1]] > 0
      real = real.reshape(*real.shape, *(1,) * (recorded.ndim - 2))
      return np.where(real, compute(), recorded)

    return Check(filled)

  found = {
    "loss": Check(lambda: case.value("loss")[None]),
    "text_loss": Check(lambda: case.value("text")[None]),
    "gen_loss": Check(lambda: case.value("code")[None]),
    "labels_final": Check(lambda: case.final_labels),
    "logits": Check(lambda: case.logits),
    "logits_every64": everywhere(
      "logits_every64", lambda: case.value("logits")[:, ::64], 64
    ),
    "logsumexp": everywhere(
      "logsumexp",
      lambda: jax.scipy.special.logsumexp(case.value("logits"), -1),
    ),
    "argmax": dataclasses.replace(
      everywhere("argmax", lambda: jnp.argmax(case.value("logits"), -1)),
      margin=case.argmax_margin,
    ),
    "label_logit": everywhere("label_logit", case.label_logit),
    "mask_token_ids": Check(
      lambda: case.encoded[0], margin=lambda: case.encoded[1]
    ),
    "var_input": Check(lambda: case.encoded[2]),
    "vit_embeds": Check(lambda: case.value("vision")),
  }
  found = {prefix + name: check for name, check in found.items()}
  return found | gradient_checks(
    case.golden, prefix, "out.grad_names", lambda: case.trained[1]
  )
