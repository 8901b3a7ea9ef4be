"""Strict settings for the whole suite, before anything imports jax."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Commands that tests start leave nothing in the user's cache.
os.environ.setdefault("ARGENSEG_COMPILATION_CACHE", "off")
# The tests and the processes that they start share what they compile; the
# suite's first process makes the directory and removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _cache = tempfile.mkdtemp(prefix="argenseg-tests-")
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tests compile much and compute little: quick compilation is worth more.
os.environ["XLA_FLAGS"] = " ".join(
  (os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0")
)

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes in signatures are checked at run time, in tests only.
_CHECKED = [
  "argenseg_jax.kernels",
  "argenseg_jax.losses",
  "argenseg_jax.models",
  "argenseg_jax.sampling",
]
jaxtyping.install_import_hook(_CHECKED, "beartype.beartype")


@pytest.fixture
def golden():
  """Loads a folder of `tests/golden`: its inputs and recorded outputs."""
  import numpy as np

  root = os.path.join(os.path.dirname(__file__), "golden")

  def load(name):
    with np.load(os.path.join(root, name, "io.npz")) as arrays:
      return dict(arrays)

  return load
