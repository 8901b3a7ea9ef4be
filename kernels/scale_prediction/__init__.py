"""From hidden states to the codes of one scale, without logits in memory."""

from typing import NamedTuple

from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

from argenseg_jax.kernels import dispatch, noise


class Scores(NamedTuple):
  """Scores of the chosen codes; their difference is the log-probability."""

  logits: Float[Array, "b n"]  # float32; before temperature and noise.
  log_sum_exp: Float[Array, "b n"]  # float32; over all codes' logits.


class Prediction(NamedTuple):
  """The codes of one scale, and what each stands for."""

  codes: Int[Array, "b n"]
  latents: Float[Array, "b n c"]
  scores: Scores


def scale_prediction(
  hidden: Float[Array, "b n d"],
  code_head: Float[Array, "codes d"],
  codebook: Float[Array, "codes c"],
  *,
  key: Key[Array, ""] | UInt32[Array, "words"] | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  implementation: dispatch.Implementation | None = None,
) -> Prediction:
  """Codes with the highest (or sampled) logit, and their codebook rows.

  The logits are hidden @ code_head.T in float32. Ties go to the lowest code.
  With a temperature, codes are drawn from softmax(logits / temperature) by
  adding Gumbel noise; the noise depends on the key, the row of [b n] and the
  code, not on the implementation. No gradient passes.

  Guidance mixes two predictions: (1 + s) * conditional - s * unconditional
  logits. A head without bias is linear, (a x + b y) @ W.T = a x @ W.T + b y @
  W.T for any a and b, so the mixed logits are exactly the logits of the mixed
  hidden states: pass (1 + s) * hidden_conditional - s * hidden_unconditional,
  and one head product serves both. Nothing is lost but one rounding to the
  dtype of `hidden`, if the mixture is formed in float32. (Mixed probabilities,
  or a head with softcap, would need both products.)

  Args:
    hidden: last hidden states of one scale, bfloat16 or float32.
    code_head: the head's rows of the codes, in the dtype of `hidden`.
    codebook: any float dtype; the latents have it too.
    key: random key, needed with a temperature.
    temperature: 0 takes the arg-max.
    top_k: with a temperature, draws only from codes whose logit is at least
      the k-th highest.
    implementation: see `dispatch.load`.

  Returns:
    codes (int32), latents and scores.

  Raises:
    ValueError: dtypes that differ, a temperature without key, a `top_k` outside
      1..codes, or no such implementation.
  """
  if hidden.dtype != code_head.dtype:
    raise ValueError(
      f"hidden is {hidden.dtype} and code_head is {code_head.dtype}; "
      "cast one of them."
    )
  if temperature < 0:
    raise ValueError(f"temperature {temperature} must not be negative.")
  seed = None
  if temperature:
    if key is None:
      raise ValueError(f"temperature {temperature} needs a random key.")
    seed = noise.make_seed(key)
  check_top_k(top_k, code_head.shape[0])
  hidden, code_head, codebook = lax.stop_gradient((hidden, code_head, codebook))
  b, n, d = hidden.shape
  module = dispatch.load("scale_prediction", implementation)
  codes, latents, logits, log_sum_exp = module.predict(
    hidden.reshape(b * n, d),
    code_head,
    codebook,
    seed=seed,
    temperature=float(temperature),
    top_k=top_k if temperature else None,
  )
  return Prediction(
    codes=codes.reshape(b, n),
    latents=latents.reshape(b, n, -1),
    scores=Scores(logits.reshape(b, n), log_sum_exp.reshape(b, n)),
  )


def check_top_k(top_k: int | None, codes: int) -> None:
  """Raises ValueError unless 1..codes or None."""
  if top_k is not None and not 1 <= top_k <= codes:
    raise ValueError(f"top_k {top_k} is outside 1..{codes}.")
