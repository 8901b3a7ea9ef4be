"""Compiles every kernel at production shapes for TPUs that are not here.

Example:

  python -m argenseg_jax.tools.compile_kernels --chips=v5e,v6e

The real TPU compiler runs on the CPU (it comes with libtpu). One line is
printed per kernel, shape and chip: the compiler's temporary memory, that of the
matrix which the kernel avoids (logits or distances, float32), and the time to
compile. Exits with 1 if anything fails.
"""

import argparse
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from argenseg_jax.kernels.chips import TPUS
from argenseg_jax.kernels.linear_cross_entropy import (
  linear_cross_entropy,
)
from argenseg_jax.kernels.linear_cross_entropy import (
  shapes as loss_shapes,
)
from argenseg_jax.kernels.nearest_code import nearest_code
from argenseg_jax.kernels.nearest_code import shapes as code_shapes
from argenseg_jax.kernels.scale_prediction import scale_prediction
from argenseg_jax.kernels.scale_prediction import (
  shapes as prediction_shapes,
)

_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "3",
}


class Case(NamedTuple):
  """A kernel at one shape."""

  name: str
  function: Any
  inputs: tuple[jax.ShapeDtypeStruct, ...]
  avoided: int  # Bytes of the matrix that the kernel never stores.


def cases() -> Iterator[Case]:
  """All kernels at all production shapes, as functions of `Case.inputs`."""

  def struct(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

  def loss(hidden, head, targets, weights):
    return jnp.sum(
      linear_cross_entropy(hidden, head, targets, weights, implementation="tpu")
    )

  for shape in loss_shapes.PRODUCTION:
    t, d, words = shape
    inputs = (
      struct("bfloat16", t, d),
      struct("bfloat16", words, d),
      struct("int32", t),
      struct("float32", t),
    )
    function = jax.value_and_grad(loss, argnums=(0, 1))
    name = f"linear_cross_entropy + gradients {tuple(shape)}"
    yield Case(name, function, inputs, 4 * t * words)
  for shape in prediction_shapes.PRODUCTION:
    b, n, d, codes, c = shape
    inputs = (
      struct("bfloat16", b, n, d),
      struct("bfloat16", codes, d),
      struct("float32", codes, c),
      struct("uint32", 2),
    )
    for temperature, top_k in ((0.0, None), (1.0, prediction_shapes.TOP_K)):
      function = functools.partial(_predict, temperature, top_k)
      kind = f"sampled, top {top_k}" if temperature else "arg-max"
      name = f"scale_prediction ({kind}) {tuple(shape)}"
      yield Case(name, function, inputs, 4 * b * n * codes)
  for shape in code_shapes.PRODUCTION:
    n, c, codes = shape
    inputs = (struct("float32", n, c), struct("float32", codes, c))
    function = functools.partial(nearest_code, implementation="tpu")
    yield Case(f"nearest_code {tuple(shape)}", function, inputs, 4 * n * codes)


def _predict(temperature, top_k, hidden, head, codebook, key):
  return scale_prediction(
    hidden,
    head,
    codebook,
    key=jax.random.wrap_key_data(key),
    temperature=temperature,
    top_k=top_k,
    return_scores=True,
    implementation="tpu",
  )


def compile_case(case: Case, chip: str) -> jax.stages.Compiled:
  """Compiles for one core of `chip`; raises what the compiler raises."""
  os.environ.update(_ENVIRONMENT)
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=TPUS[chip].topology
  )
  mesh = Mesh(np.asarray(topology.devices[:1]), ("device",))
  sharding = NamedSharding(mesh, PartitionSpec())
  inputs = (
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    for x in case.inputs
  )
  with jax.set_mesh(mesh):
    return jax.jit(case.function).lower(*inputs).compile()


def has_compiler() -> bool:
  """Whether the TPU compiler is installed."""
  return importlib.util.find_spec("libtpu") is not None


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m argenseg_jax.tools.compile_kernels",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--chips",
    default=",".join(TPUS),
    help="comma-separated; default: %(default)s",
  )
  parser.add_argument(
    "--kernel", default="", help="only kernels whose name contains this"
  )
  options = parser.parse_args(argv)
  chips = options.chips.split(",")
  unknown = sorted(set(chips) - set(TPUS))
  if unknown:
    parser.error(f"unknown chip {unknown[0]!r}; use {', '.join(TPUS)}")
  if not has_compiler():
    parser.error(
      "the TPU compiler is missing; install it with: "
      'pip install "jax[tpu]==' + jax.__version__ + '"'
    )
  jax.config.update("jax_platforms", "cpu")
  failures = 0
  heading = ("chip", "kernel and shape", "temp MiB", "avoided", "seconds")
  print("{:6} {:62} {:>9} {:>9} {:>8}".format(*heading))
  for chip in chips:
    for case in cases():
      if options.kernel not in case.name:
        continue
      start = time.monotonic()
      try:
        temp = compile_case(case, chip).memory_analysis().temp_size_in_bytes
        result = f"{temp / 2**20:9.2f} {case.avoided / 2**20:9.1f}"
      except jax.errors.JaxRuntimeError as error:
        failures += 1
        result = "failed: " + str(error).split("\n\n")[0][:200]
      seconds = time.monotonic() - start
      print(f"{chip:6} {case.name:62} {result} {seconds:8.1f}", flush=True)
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())
