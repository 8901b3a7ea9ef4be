"""Steps without a finite loss change nothing, are named, and end a run if they
do not stop."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.runtime.nan_guard import Diverged, NonFinite, Verdict
from argenseg_jax.training.best_checkpoint import Scores


def _note(guard, flags, first=1):
  for step, skipped in enumerate(flags, first):
    records = np.array([step * 10, step * 10 + 1, -1])
    verdict = Verdict(jnp.asarray(skipped), jnp.asarray(False), records)
    guard.note(step, verdict)


def test_skipped_steps_are_named_once_with_their_records(tmp_path, capsys):
  path = tmp_path / "non_finite.jsonl"
  guard = NonFinite(path, limit=3)
  _note(guard, [False, True, True, False, True])
  guard.check(4)
  assert guard.skipped == 2
  guard.check(5)
  guard.check(5)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["step"] for line in lines] == [2, 3, 5]
  assert lines[0]["records"] == [20, 21]
  assert "step 2 skipped" in capsys.readouterr().err


def test_too_many_in_a_row_end_the_run_across_checks(tmp_path):
  guard = NonFinite(tmp_path / "non_finite.jsonl", limit=3)
  _note(guard, [True, False, True, True])
  guard.check(4)
  _note(guard, [True], first=5)
  with pytest.raises(Diverged, match=r"3 steps in a row.*last of them 5"):
    guard.check(5)


def test_limit_zero_never_ends_the_run(tmp_path):
  guard = NonFinite(tmp_path / "non_finite.jsonl", limit=0)
  _note(guard, [True] * 50)
  guard.check(50)
  assert guard.skipped == 50


def test_other_processes_count_and_do_not_write(tmp_path):
  guard = NonFinite(tmp_path / "non_finite.jsonl", limit=2, active=False)
  _note(guard, [True, True])
  with pytest.raises(Diverged):
    guard.check(2)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_save_after_a_bad_loss_has_no_score(bad):
  scores = Scores()
  for loss in (1.0, bad, 3.0):
    scores.add_loss(jnp.asarray(loss))
  assert scores("loss", 3) is None
  scores.add_loss(jnp.asarray(3.0))
  scores.add_loss(jnp.asarray(4.0))
  assert scores("loss", 5) == -3.5


def test_a_score_is_one_that_was_measured_at_its_own_step():
  scores = Scores()
  assert scores("ciou", 1) is None
  scores.add_ciou(4, 0.25)
  assert scores("ciou", 4) == 0.25
  assert scores("ciou", 6) is None
