"""Drawn words and codes follow their distribution; greedy is temperature 0."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from argenseg_jax.inference.decoding import GenerationOptions
from argenseg_jax.inference.generate import generate
from argenseg_jax.inference.sampler import GREEDY, Choice, choose_words


def test_words_follow_their_distribution():
  logits = jnp.asarray([1.0, 0.0, 3.0, -2.0, 2.0])
  many = jnp.broadcast_to(logits, (10_000, 5))

  def shares(choice):
    drawn = choose_words(many, choice, jax.random.key(0))
    return np.bincount(drawn, minlength=5) / len(many)

  np.testing.assert_allclose(
    shares(Choice(temperature=2.0)), jax.nn.softmax(logits / 2), atol=0.02
  )
  best = jnp.where(logits >= 2, logits, -jnp.inf)
  np.testing.assert_allclose(
    shares(Choice(temperature=1.0, top_k=2)), jax.nn.softmax(best), atol=0.02
  )
  assert np.all(choose_words(many, GREEDY, None) == 2)
  best = Choice(temperature=9.0, top_k=1)
  assert np.all(choose_words(many, best, jax.random.key(1)) == 2)


def test_bad_settings_are_refused():
  logits = jnp.zeros((1, 5))
  with pytest.raises(ValueError, match="negative"):
    Choice(temperature=-1.0)
  with pytest.raises(ValueError, match="random key"):
    choose_words(logits, Choice(temperature=1.0), None)
  with pytest.raises(ValueError, match=r"top_k 6 is outside 1\.\.5"):
    choose_words(logits, Choice(top_k=6), None)


@functools.partial(jax.jit, static_argnames=("graph", "choice"))
def answer(graph, state, key, choice):
  """Two answers to one prompt."""
  model = nnx.merge(graph, state)
  tokens = jnp.asarray([[12, 14, 13, 17]] * 2, jnp.int32)
  return generate(
    model,
    GenerationOptions(
      max_text=6,
      text_choice=choice,
      code_choice=dataclasses.replace(choice, top_k=None),
    ),
    tokens=tokens,
    valid=jnp.ones_like(tokens, bool),
    vision=None,
    key=key,
  )


@pytest.mark.slow
def test_answers_are_drawn():
  parts = nnx.split(tiny_model.model())
  first, second = jax.random.split(jax.random.key(0))
  greedy = answer(*parts, first, GREEDY)
  same = answer(*parts, second, GREEDY)
  np.testing.assert_array_equal(greedy.tokens, same.tokens)
  np.testing.assert_array_equal(greedy.codes, same.codes)
  np.testing.assert_array_equal(greedy.tokens[0], greedy.tokens[1])
  choice = Choice(temperature=1.0, top_k=30)
  drawn = answer(*parts, first, choice)
  again = answer(*parts, first, choice)
  other = answer(*parts, second, choice)
  np.testing.assert_array_equal(drawn.tokens, again.tokens)
  np.testing.assert_array_equal(drawn.codes, again.codes)
  assert np.any(np.asarray(drawn.tokens) != np.asarray(other.tokens))
  assert np.any(np.asarray(drawn.tokens[0]) != np.asarray(drawn.tokens[1]))


def test_codes_follow_their_distribution():
  model = tiny_model.model()
  tokens = jnp.asarray([[12, 14, 13, 17]] * 1000, jnp.int32)

  @jax.jit
  def codes(state, key):
    return generate(
      nnx.merge(nnx.graphdef(model), state),
      GenerationOptions(
        max_text=2,
        num_scales=1,
        start_with_mask=True,
        stop_after_masks=True,
        code_choice=Choice(temperature=1.0),
      ),
      tokens=tokens,
      valid=jnp.ones_like(tokens, bool),
      vision=None,
      key=key,
    )

  out = codes(nnx.state(model), jax.random.key(3))
  drawn = np.asarray(out.codes)[:, 0, 0]
  chances = np.zeros(11)
  chances[drawn] = np.exp(np.asarray(out.log_probs)[:, 0, 0])
  shares = np.bincount(drawn, minlength=11) / len(drawn)
  np.testing.assert_allclose(chances.sum(), 1, atol=0.05)
  np.testing.assert_allclose(shares, chances, atol=0.05)
