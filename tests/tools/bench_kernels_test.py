"""What `argenseg bench kernels` refuses."""

import pytest

from argenseg_jax.planning import topology
from argenseg_jax.tools.bench import kernels


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--chips=v5e", 'v5e is missing; install it with: pip install "jax[tpu]=='),
    ("--chips=v5e,h300", "unknown chip 'h300'; use v5e"),
    ("--repeats=0", "--repeats must be at least 1"),
  ],
)
def test_refuses(argument, message, monkeypatch, capsys):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setattr(topology, "has_compiler", lambda platform: False)
  with pytest.raises(SystemExit) as stopped:
    kernels.main([argument])
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert message in error
