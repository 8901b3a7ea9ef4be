"""How words and codes are chosen from their logits: the best, or by chance."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from argenseg_jax.kernels.scale_prediction import check_top_k


@dataclasses.dataclass(frozen=True)
class Choice:
  """Temperature 0 takes the arg-max.

  Attributes:
    temperature: draws from softmax(logits / temperature).
    top_k: draws only from the so many highest logits; None from all.
  """

  temperature: float = 0.0
  top_k: int | None = None

  def __post_init__(self):
    if self.temperature < 0:
      raise ValueError(f"temperature {self.temperature} is negative.")


GREEDY = Choice()


def choose_words(
  logits: Float[Array, "b vocab"],
  choice: Choice,
  key: Key[Array, ""] | None,
) -> Int[Array, "b"]:
  """One word a row; ties of the arg-max go to the lowest word.

  Raises:
    ValueError: a temperature without key, or `top_k` outside 1..vocab.
  """
  check_top_k(choice.top_k, logits.shape[-1])
  if choice.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if key is None:
    raise ValueError(f"temperature {choice.temperature} needs a random key.")
  if choice.top_k is not None:
    lowest = jax.lax.top_k(logits, choice.top_k)[0][:, -1:]
    logits = jnp.where(logits >= lowest, logits, -jnp.inf)
  drawn = jax.random.categorical(key, logits / choice.temperature)
  return drawn.astype(jnp.int32)
