"""A few spoiled files for every parser; see `fuzzing.py` for many."""

import pytest
from faults import fuzzing


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_spoiled_files_are_refused_in_a_sentence(name):
  fuzzing.test_of(name, max_examples=15, derandomize=True)()
