"""Masks tokenized once: the codes of a source's masks, kept in a file."""

import dataclasses
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from argenseg_jax import sharding
from argenseg_jax.config import ConfigError
from argenseg_jax.data import file_stamps, pipeline, safe_npz
from argenseg_jax.models.argenseg import normalize_seg_masks
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.runtime import distributed, paths
from argenseg_jax.runtime.metric_writer import Progress
from argenseg_jax.runtime.paths import Path

# Settings that change what the image tokenizer sees.
_SETTINGS = (
  "mask_side",
  "mask_intermediate_side",
  "mask_channels",
  "max_masks",
  "pad_square",
  "resize",
)
_NOTE_BYTES = 1 << 20  # More than the note and numpy's headers take.


def cached(
  rows: pipeline.RowMaker,
  vqvae: VQVAE,
  path: Path,
  *,
  renew: bool = False,
) -> pipeline.RowMaker:
  """The rows with the codes of their masks, from `path` if it holds them.

  Codes of something else are made again if `renew`, and refused otherwise.
  """
  if distributed.agree(path.exists()):
    try:
      return read(rows, vqvae, path, remedy="add --accept_changed_data")
    except ConfigError:
      if not renew:
        raise
  write(rows, vqvae, path)
  distributed.wait_for_all(f"codes {path.name}")
  return read(rows, vqvae, path)


def write(rows: pipeline.RowMaker, vqvae: VQVAE, path: Path) -> None:
  """Tokenizes every mask and writes codes and a note of what made them.

  Raises:
    ConfigError: a record of the source asks for another mask at each visit.
  """
  before = file_stamps.stamps(rows.source)
  codes = tokenize(rows, vqvae)
  note = json.dumps(_note(rows, vqvae))
  changed = file_stamps.first_changed(rows.source, before)
  if changed:
    raise ConfigError(
      f"{changed} of data source {rows.config.path} changed while its masks "
      "were tokenized; rerun the same command when it is complete."
    )
  if distributed.is_main():
    local = paths.is_local(path)
    partial = path.with_name(f"{path.name}.partial") if local else path
    with partial.open("wb") as file:
      np.savez(file, codes=codes, note=note, **before._asdict())
    if local:  # A bucket shows whole files only.
      partial.rename(path)


def read(
  rows: pipeline.RowMaker,
  vqvae: VQVAE,
  path: Path,
  *,
  remedy: str = "tokenize again",
) -> pipeline.RowMaker:
  """The rows with the codes that `write` put into `path`.

  Args:
    rows: of the same data.
    vqvae: the image tokenizer that made them.
    path: of the file.
    remedy: what to do about other codes, for messages.

  Raises:
    ConfigError: no such file, or one of other data, settings or image
      tokenizer; or an image or mask is another on disk than it was.
  """
  shape = (len(rows.source), rows.config.max_masks, rows.num_codes)
  codes, note, known = stored(path, shape, vqvae.quantizer.codebook.shape[0])
  wanted = _note(rows, vqvae)
  other = sorted(k for k in wanted if note.get(k) != wanted[k])
  if other:
    raise ConfigError(
      f"the codes in {path} were made with another {', '.join(other)}; "
      f"{remedy}."
    )
  if codes.shape != shape:
    raise ConfigError(
      f"the codes in {path} have shape {codes.shape}, not {shape}; {remedy}."
    )
  changed = file_stamps.first_changed(rows.source, known)
  if changed:
    raise ConfigError(
      f"the codes in {path} were made of other files: {changed} has changed on "
      f"disk since; {remedy}."
    )
  return rows.with_codes(codes)


def stored(
  path: Path, shape: tuple[int, int, int], num_codes: int
) -> tuple[Int[np.ndarray, "records m n"], dict, file_stamps.Stamps]:
  """Codes, note and stamps of a file, of which nothing is believed.

  Args:
    path: what `write` wrote.
    shape: that the codes must have; a file that holds more is not unpacked.
    num_codes: of the codebook.

  Raises:
    ConfigError: no such file.
  """
  most = math.prod(shape) * 8 + shape[0] * 16 + _NOTE_BYTES
  try:
    found = safe_npz.read(path, lambda size: most)
    codes, note = found["codes"], json.loads(str(found["note"]))
    if not isinstance(note, dict):
      raise ValueError("its note is no JSON object")
    if codes.dtype.kind != "i" or np.any((codes < 0) | (codes >= num_codes)):
      raise ValueError(
        f"it contains something else than codes below {num_codes}"
      )
    if "quick" not in found:
      raise ValueError("it does not say which files it was made of")
    known = file_stamps.Stamps(found["quick"], found["content"])
    if known.quick.ndim != 1 or known.quick.shape != known.content.shape:
      raise ValueError("its stamps are no lists")
  except (*safe_npz.ERRORS, RecursionError) as error:
    raise ConfigError(
      f"{path} is not a file of `argenseg data tokenize`: {error}."
    ) from error
  return codes, note, known


def tokenize(
  rows: pipeline.RowMaker, vqvae: VQVAE, *, batch_size: int = 64
) -> np.ndarray:
  """Codes of all masks of a source, int32 [records m n]; 0 where none is."""
  if rows.source.has_options:
    raise ConfigError(
      f"data source {rows.config.source!r} at {rows.config.path} asks for one "
      "of several masks at each visit, so its codes cannot be kept; train from "
      "the masks."
    )
  graph, state = nnx.split(vqvae)

  @sharding.jit
  def encode(state, seg_masks):
    return nnx.merge(graph, state).encode(normalize_seg_masks(seg_masks))

  masks_only = dataclasses.replace(
    rows.config, sequence_length=0, max_images=0, cache=False
  )
  reader = pipeline.RowMaker(
    rows.source,
    masks_only,
    tokenizer=None,
    image_tokens=rows.image_tokens,
    num_codes=rows.num_codes,
  )
  total = len(rows.source)
  bar = Progress("tokenize masks", total)
  parts = []
  for batch in pipeline.eval_batches(reader, batch_size):
    b, m, *shape = batch.seg_masks.shape
    seg_masks = batch.seg_masks.reshape(b * m, *shape)
    codes = encode(state, sharding.put_like(seg_masks, state))
    codes = distributed.fetch(codes).reshape(b, m, -1)
    parts.append(np.where(batch.mask_valid[:, :, None], codes, 0))
    bar.update(min(len(parts) * batch_size, total))
  bar.close()
  return np.concatenate(parts)[:total]


def _note(rows: pipeline.RowMaker, vqvae: VQVAE) -> dict:
  settings = {name: getattr(rows.config, name) for name in _SETTINGS}
  return {
    "source": rows.source.fingerprint,
    "image tokenizer": _fingerprint(vqvae),
    **settings,
  }


def _fingerprint(vqvae: VQVAE) -> str:
  """Of its variables in bfloat16, which a run may keep them in."""
  content = hashlib.sha256()
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    nnx.to_pure_dict(nnx.state(vqvae))
  )
  for path, leaf in leaves:
    content.update(jax.tree_util.keystr(path).encode())
    value = np.asarray(distributed.fetch(leaf))
    if jnp.issubdtype(value.dtype, jnp.floating):
      value = value.astype(jnp.bfloat16)
    content.update(value.tobytes())
  return content.hexdigest()[:16]
