"""Easy rows are counted, not easy steps."""

import json

from argenseg_jax.data.curriculum import Curriculum


class _Batches:
  """As much of `TrainIterator` as a curriculum asks for."""

  def __init__(self, name, size):
    self.name, self.global_batch_size, self.step = name, size, 0

  def __next__(self):
    self.step += 1
    return self.name

  def state(self):
    return {"next_index": self.step * self.global_batch_size}

  def set_state(self, state, *, force=False):
    self.step = state["next_index"] // self.global_batch_size

  def close(self):
    pass


def _curriculum(size, steps=4):
  return Curriculum(_Batches("easy", size), _Batches("main", size), steps)


def _resumed(state, size, steps=4):
  curriculum = _curriculum(size, steps)
  curriculum.set_state(json.loads(json.dumps(state)), force=True)
  return [next(curriculum) for _ in range(6)]


def test_another_batch_size_takes_as_many_easy_rows():
  curriculum = _curriculum(8)  # 32 easy rows.
  begun = [next(curriculum) for _ in range(2)]
  assert begun == ["easy"] * 2
  half = curriculum.state()
  assert _resumed(half, 16).count("easy") == 1
  assert _resumed(half, 4).count("easy") == 4
  done = [next(curriculum) for _ in range(3)]
  assert done == ["easy", "easy", "main"]
  # It came back: 4 steps of 16 rows are more than the 32 that are taken.
  assert _resumed(curriculum.state(), 16) == ["main"] * 6


def test_another_length_counts():
  curriculum = _curriculum(8)
  next(curriculum)
  assert _resumed(curriculum.state(), 8, steps=3).count("easy") == 2
