"""Strict settings for the whole suite, before anything imports jax."""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Commands that tests start leave nothing in the user's cache.
os.environ.setdefault("ARGENSEG_COMPILATION_CACHE", "off")
# Tests compile much and compute little: quick compilation is worth more. The
# processes that they start inherit this.
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    # Later ones do not know it, and end.
    "--xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else "",
    "--xla_cpu_parallel_codegen_split_count=1",
  )
)

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes in signatures are checked at run time, in tests only.
_CHECKED = [
  "argenseg_jax.kernels",
  "argenseg_jax.models",
  "argenseg_jax.inference.generate",
]
jaxtyping.install_import_hook(_CHECKED, "beartype.beartype")


# They take minutes: begun last, one would run alone.
_FIRST = (
  "killing_test.py",
  "processes_test.py",
  "distributed_test.py",
  "preemption_test.py",
  "loop_test.py",
  "gcs_workdir_test.py",
)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture
def golden():
  """Loads a folder of `tests/golden`: its inputs and recorded outputs."""
  import numpy as np

  root = os.path.join(os.path.dirname(__file__), "golden")

  def load(name):
    with np.load(os.path.join(root, name, "io.npz")) as arrays:
      return dict(arrays)

  return load
