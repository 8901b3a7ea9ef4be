"""Compiles every kernel at production shapes for chips that you don't have.

Examples:

  python -m argenseg_jax.tools.compile_kernels --chips=v5e,v6e
  python -m argenseg_jax.tools.compile_kernels --chips=h100 --markdown
  python -m argenseg_jax.tools.compile_kernels --results=all.json --markdown

The real compilers run on the CPU: TPUs' comes with `pip install "jax[tpu]"`,
GPUs' with `pip install "jax[cuda12]"`. One line is printed per kernel, shape
and chip: the compiler's temporary memory, the size of the matrix which the
kernel avoids (logits or distances, float32), and the time to compile. What
stands in the file of --results is not compiled again, so that a long run can go
on where it was stopped; delete the file after a change of a kernel. Exits with
1 if anything fails.
"""

import argparse
import functools
import json
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

from argenseg_jax.kernels.chips import CHIPS
from argenseg_jax.kernels.dispatch import Implementation
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
from argenseg_jax.planning import topology
from argenseg_jax.tools.common import temp_bytes

# The same processors as the H100's: its kernels are these.
_NOT_COMPILED = ("h200",)


class Case(NamedTuple):
  """A kernel at one shape."""

  name: str
  function: Any
  inputs: tuple[jax.ShapeDtypeStruct, ...]
  avoided: int  # Bytes of the matrix that the kernel never stores.


def cases(implementation: Implementation) -> Iterator[Case]:
  """All kernels at all production shapes, as functions of `Case.inputs`.

  Args:
    implementation: "tpu" or "gpu"; the latter has no top_k.
  """

  def struct(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

  def loss(hidden, head, targets, weights):
    return jnp.sum(
      linear_cross_entropy(
        hidden, head, targets, weights, implementation=implementation
      )
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
  top_k = prediction_shapes.TOP_K if implementation == "tpu" else None
  sampled = f"sampled, top {top_k}" if top_k else "sampled"
  for shape in prediction_shapes.PRODUCTION:
    b, n, d, codes, c = shape
    inputs = (
      struct("bfloat16", b, n, d),
      struct("bfloat16", codes, d),
      struct("float32", codes, c),
      struct("uint32", 2),
    )
    for kind, options in (
      ("arg-max", {}),
      (sampled, {"temperature": 1.0, "top_k": top_k}),
    ):
      function = functools.partial(_predict, implementation, options)
      name = f"scale_prediction ({kind}) {tuple(shape)}"
      yield Case(name, function, inputs, 4 * b * n * codes)
  for shape in code_shapes.PRODUCTION:
    n, c, codes = shape
    inputs = (struct("float32", n, c), struct("float32", codes, c))
    function = functools.partial(nearest_code, implementation=implementation)
    yield Case(f"nearest_code {tuple(shape)}", function, inputs, 4 * n * codes)


def _predict(implementation, options, hidden, head, codebook, key):
  return scale_prediction(
    hidden,
    head,
    codebook,
    key=jax.random.wrap_key_data(key),
    implementation=implementation,
    **options,
  )


def compile_for(
  chip: str, function: Any, inputs: tuple[jax.ShapeDtypeStruct, ...]
) -> jax.stages.Compiled:
  """Compiles for one device of `chip`; raises what the compiler raises."""
  os.environ.update(topology.ENVIRONMENT)
  description = CHIPS[chip].topology
  if CHIPS[chip].platform == "tpu":
    described = topologies.get_topology_desc(
      platform="tpu", topology_name=description
    )
  else:
    described = topologies.get_topology_desc(
      platform="cuda",
      target_config=topology.gpu_target(chip),
      topology=description,
    )
  device = described.devices[0]
  mesh = Mesh(np.asarray([device]), ("device",))
  sharding = NamedSharding(mesh, PartitionSpec())
  placed = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in inputs
  ]
  # Others' kernels look at the default device, ours at the mesh.
  with jax.set_mesh(mesh), jax.default_device(device):
    return jax.jit(function).lower(*placed).compile()


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m argenseg_jax.tools.compile_kernels",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  known = [chip for chip in CHIPS if chip not in _NOT_COMPILED]
  parser.add_argument(
    "--chips",
    help=f"comma-separated, of {','.join(known)}; default: those whose "
    "compiler is installed",
  )
  parser.add_argument(
    "--kernel", default="", help="only kernels whose name contains this"
  )
  parser.add_argument(
    "--results",
    help="JSON file that collects results; a later run resumes from it",
  )
  parser.add_argument(
    "--markdown",
    action="store_true",
    help="print a table of all results in the end: a row a case, a column a "
    "chip, temp MiB in the cells",
  )
  options = parser.parse_args(argv)
  if options.chips:
    chips = options.chips.split(",")
  else:
    chips = [c for c in known if topology.has_compiler(CHIPS[c].platform)]
  if unknown := sorted(set(chips) - set(known)):
    parser.error(f"unknown chip {unknown[0]!r}; use {', '.join(known)}")
  for platform in {CHIPS[chip].platform for chip in chips} or {"tpu"}:
    if not topology.has_compiler(platform):
      hint = topology.install_hint(platform)
      parser.error(f"the {platform.upper()} compiler is missing; {hint}")
  jax.config.update("jax_platforms", "cpu")
  return 1 if _compile_all(chips, options) else 0


def _compile_all(chips, options) -> int:
  """Prints lines, then the table; returns the number of failures."""
  results = {}  # Of a chip, of a case: temporary MiB, or why there are none.
  if options.results and os.path.exists(options.results):
    with open(options.results, encoding="utf-8") as file:
      results = json.load(file)
  line = "{:6} {:63} {:>9} {:>9} {:>8}"
  print(line.format("chip", "kernel and shape", "temp MiB", "avoided", "s"))
  for chip in chips:
    done = results.setdefault(chip, {})
    for case in cases(CHIPS[chip].platform):
      known = isinstance(done.get(case.name), float)
      if options.kernel not in case.name or known:
        continue
      start = time.monotonic()
      try:
        compiled = compile_for(chip, case.function, case.inputs)
        temp = temp_bytes(compiled) / 2**20
        done[case.name], result = temp, f"{temp:.2f}"
      except jax.errors.JaxRuntimeError as error:
        result = "failed: " + str(error).split("\n\n")[0][:200]
        done[case.name] = result
      seconds = f"{time.monotonic() - start:.1f}"
      avoided = f"{case.avoided / 2**20:.1f}"
      print(line.format(chip, case.name, result, avoided, seconds), flush=True)
      if options.results:
        with open(options.results, "w", encoding="utf-8") as file:
          json.dump(results, file, indent=1)
  if options.markdown:
    _print_table(results)
  return sum(
    isinstance(result, str)
    for chip in chips
    for name, result in results[chip].items()
    if options.kernel in name
  )


def _print_table(results):
  """A row a case, a column a chip, with temporary MiB or "failed"."""
  matrices = {
    case.name: case.avoided / 2**20 for p in ("tpu", "gpu") for case in cases(p)
  }
  print("\n| " + " | ".join(("kernel and shape", *results, "avoided")) + " |")
  print("|---" + "|---:" * (len(results) + 1) + "|")
  for name, matrix in matrices.items():
    row = [done.get(name, "") for done in results.values()]
    cells = [
      f"{x:.2f}" if isinstance(x, float) else x.partition(":")[0] for x in row
    ]
    if any(cells):
      print(f"| {name} | " + " | ".join(cells) + f" | {matrix:.1f} |")


if __name__ == "__main__":
  sys.exit(main())
