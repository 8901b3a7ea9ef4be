"""Parity of the whole model: teacher-forced training cases and generation."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from argenseg_jax.models import losses
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.torch_weights import importing, rules
from argenseg_jax.torch_weights.parity import generation
from argenseg_jax.torch_weights.parity.compare import (
  Check,
  Golden,
  gradient_checks,
  torch_gradients,
)
from argenseg_jax.torch_weights.parity.vqvae import margins
from argenseg_jax.types import CODE_TARGET, IGNORE_TARGET, ModelInputs

_IGNORE_LABEL = -100


def checks(golden: Golden) -> dict[str, Check]:
  """One check for every array that this kind of folder may hold."""
  config = importing.whole_config(golden.config, golden.weights, None)
  table = rules.argenseg(config)
  graph, state = golden.load(lambda: ARGenSeg(config, rngs=nnx.Rngs(0)), table)

  # One mask or picture at a time: the same two programs serve all cases.
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
      found |= _training(golden, match[1], graph, state, table, encode)
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


def _training(golden, case, graph, state, table, encode) -> dict[str, Check]:
  def given(name):
    return golden[f"in.{case}.{name}"]

  # A module that is not run: it knows sizes only.
  model = nnx.merge(graph, state)
  ids = model.config.token_ids
  tokens = given("input_ids").astype(np.int32)
  labels = given("labels").astype(np.int32)
  valid = given("attention_mask").astype(np.int32)
  pixels = np.moveaxis(given("pixel_values"), 1, -1)
  seg_masks = jnp.asarray(np.moveaxis(given("masks"), 1, -1))
  slots = model.scales.num_codes - 1
  num_images = np.sum(tokens == ids.img_context, 1) // (
    model.config.vision.num_embeddings
  )
  if slots:
    num_masks = np.sum(tokens == ids.mask_context, 1) // slots
  else:
    num_masks = np.sum(tokens == ids.ge_start, 1)
  real_images = per_row(pixels[given("image_flags") > 0], num_images)
  real_masks = np.flatnonzero(given("mask_flags") > 0)
  due = np.where(labels == ids.mask_context, CODE_TARGET, labels)
  due = np.where(due == _IGNORE_LABEL, IGNORE_TARGET, due)
  targets = np.pad(due[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_TARGET)

  recorded = jnp.asarray(golden[f"out.{case}.mask_token_ids"], jnp.int32)

  @functools.cache
  def encoded():
    """Choices, margins and next-scale inputs of all masks."""
    parts = map(encode, seg_masks, recorded)
    return tuple(map(jnp.stack, zip(*parts, strict=True)))

  def forward(params, rest, codes, inputs):
    """Total loss, and what else the recorder kept."""
    model = nnx.merge(graph, params, rest)
    # Place of each row's masks among all; rows with fewer repeat the first.
    places = per_row(real_masks, num_masks)
    row_inputs, row_codes = inputs[places], codes[places]
    model_inputs = ModelInputs(
      tokens=jnp.asarray(tokens),
      positions=jnp.asarray(given("position_ids"), jnp.int32),
      segment_ids=jnp.asarray(valid),
      is_prompt=jnp.zeros(tokens.shape, bool),
      images=jnp.asarray(real_images),
      scale_inputs=row_inputs,
    )
    hidden = model(model_inputs)
    resolved, code_index = losses.resolve_targets(
      jnp.asarray(targets), row_codes, ids.first_code
    )
    sums = losses.decoder_loss(
      hidden,
      model.llm.head,
      resolved,
      code_index,
      jnp.ones(len(tokens)),
      scales=model.scales,
    )
    text, code = sums.means()
    return text + code, {
      "text": text,
      "code": code,
      "resolved": resolved,
      "logits": hidden @ model.llm.head.T,
      "vision": model.vision(jnp.asarray(pixels)),
    }

  @functools.cache
  def trained():
    # The image tokenizer is frozen in the recorder's training, too.
    params, rest = nnx.split_state(
      state, lambda path, leaf: path[0] != "vqvae", ...
    )
    run = jax.jit(jax.value_and_grad(forward, has_aux=True))
    (loss, values), gradients = run(params, rest, recorded, encoded()[2])
    zeros = jax.tree.map(jnp.zeros_like, rest)
    whole = nnx.merge_state(gradients, zeros)
    found = torch_gradients(table, whole)
    found = {
      n: g for n, g in found.items() if not n.startswith("image_tokenizer.")
    }
    return values | {"loss": loss}, found

  def value(name):
    return trained()[0][name]

  def logits():
    return np.where(valid[:, :, None] > 0, value("logits"), 0.0)

  def final_labels():
    """Codes in place of the marks, before the shift."""
    final = labels.copy()
    resolved = np.asarray(value("resolved"))[:, :-1]
    final[:, 1:] = np.where(
      labels[:, 1:] == _IGNORE_LABEL, _IGNORE_LABEL, resolved
    )
    return final

  def label_logit():
    index = np.maximum(final_labels()[:, 1:], 0)
    return np.take_along_axis(
      np.asarray(value("logits"))[:, :-1], index[:, :, None], 2
    )[:, :, 0]

  def argmax_margin():
    top = jax.lax.top_k(value("logits"), 2)[0]
    return np.asarray(top[..., 0] - top[..., 1])

  prefix = f"out.{case}."

  def everywhere(name, compute, step=1):
    """A check of an array whose padded positions, which mean nothing and which
    the recorder did not clear, are taken as recorded."""

    def filled():
      recorded = golden[prefix + name]
      real = valid[:, ::step][:, : recorded.shape[1]] > 0
      real = real.reshape(*real.shape, *(1,) * (recorded.ndim - 2))
      return np.where(real, compute(), recorded)

    return Check(filled)

  found = {
    "loss": Check(lambda: value("loss")[None]),
    "text_loss": Check(lambda: value("text")[None]),
    "gen_loss": Check(lambda: value("code")[None]),
    "labels_final": Check(final_labels),
    "logits": Check(logits),
    "logits_every64": everywhere(
      "logits_every64", lambda: value("logits")[:, ::64], 64
    ),
    "logsumexp": everywhere(
      "logsumexp", lambda: jax.scipy.special.logsumexp(value("logits"), -1)
    ),
    "argmax": dataclasses.replace(
      everywhere("argmax", lambda: jnp.argmax(value("logits"), -1)),
      margin=argmax_margin,
    ),
    "label_logit": everywhere("label_logit", label_logit),
    "mask_token_ids": Check(lambda: encoded()[0], margin=lambda: encoded()[1]),
    "var_input": Check(lambda: encoded()[2]),
    "vit_embeds": Check(lambda: value("vision")),
  }
  found = {prefix + name: check for name, check in found.items()}
  return found | gradient_checks(
    golden, prefix, "out.grad_names", lambda: trained()[1]
  )
