"""Comparing computed arrays with recorded ones: tolerances and the verdict."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from argenseg_jax import construct
from argenseg_jax.data import safe_npz
from argenseg_jax.torch_weights import hf_config, mapping, tensors
from argenseg_jax.torch_weights.importing import conversion_mesh
from argenseg_jax.torch_weights.tables import Table

ACTIVATION = 2e-4  # Of activations, logits, losses; times the largest value.
GRADIENT = 1e-3
MARGIN = 1e-4  # A choice recorded with less is a coin's toss.
_LEVELS, _PIXELS = 1, 0.999  # Of uint8 images: so many pixels are so close,
_EQUAL = 0.9  # and so many equal. Rounding what was truncated leaves half.
# Recorded numbers do not shrink to a hundredth; archives made to do harm do.
_MOST_TIMES, _ALWAYS = 100, 1 << 26


@dataclasses.dataclass(frozen=True)
class Check:
  """How one recorded array is computed and judged.

  Attributes:
    compute: gives the array, whole or already subsampled.
    margin: gives, for integer choices, how narrowly each was made.
    exact: bytes that are no image, and images made by integers alone.
    scale: what errors are relative to, where the recorded array is a
      difference of others; by default its own largest magnitude.
  """

  compute: Callable[[], Any]
  margin: Callable[[], np.ndarray | jax.Array] | None = None
  exact: bool = False
  scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
  """One line of the report.

  Attributes:
    max_abs: largest difference.
    max_rel: the same, over the largest recorded magnitude.
    ok: within tolerance.
    error: why nothing could be compared, or None.
  """

  max_abs: float
  max_rel: float
  ok: bool
  error: str | None = None


@dataclasses.dataclass(frozen=True)
class Golden:
  """A folder of recorded inputs and outputs."""

  path: pathlib.Path
  config: dict[str, Any]
  arrays: dict[str, np.ndarray]

  @classmethod
  def open(cls, path: str | pathlib.Path) -> "Golden":
    """Reads `config.json` and `io.npz`.

    Raises:
      WeightsError: one of them is absent or unreadable.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
      raise tensors.WeightsError(f"{path} is not a folder.")
    config = hf_config.read(path)
    try:
      arrays = safe_npz.read(
        path / "io.npz", lambda size: max(_MOST_TIMES * size, _ALWAYS)
      )
    except safe_npz.ERRORS as error:
      raise tensors.WeightsError(
        f"{path / 'io.npz'} cannot be read: {error}."
      ) from error
    return cls(path, config, arrays)

  @functools.cached_property
  def weights(self) -> tensors.Source:
    return tensors.open_file(self.path / "weights.safetensors")

  def load(
    self, make: Callable[[], nnx.Module], table: Table
  ) -> tuple[nnx.GraphDef, nnx.State]:
    """A module with this folder's weights, through the rules of import."""
    graph, state = nnx.split(construct.abstract(make))
    where = str(self.path / "weights.safetensors")
    mapping.check(table, mapping.variables(state), self.weights, where)
    state, _ = mapping.load(table, state, self.weights, conversion_mesh(1))
    return graph, state

  @property
  def recorded(self) -> dict[str, np.ndarray]:
    """The `out.*` arrays."""
    return {k: v for k, v in self.arrays.items() if k.startswith("out.")}

  def __getitem__(self, name: str) -> np.ndarray:
    return self.arrays[name]

  def __contains__(self, name: str) -> bool:
    return name in self.arrays


def compare(name: str, recorded: np.ndarray, check: Check) -> Verdict:
  """Computes one array and holds it against the recorded one.

  Whatever goes wrong on the way becomes a verdict that is not ok.
  """
  try:
    return _judge(name, recorded, np.asarray(check.compute()), check)
  except Exception as error:
    return failed(error)


def failed(error: Exception) -> Verdict:
  """The verdict on what could not be computed or compared."""
  reason = str(error).strip().split("\n")[0]
  return _unequal(f"{type(error).__name__}: {reason}")


def _unequal(reason: str) -> Verdict:
  return Verdict(float("inf"), float("inf"), False, reason)


def _judge(
  name: str, recorded: np.ndarray, computed: np.ndarray, check: Check
) -> Verdict:
  computed = subsample(computed, recorded.shape)
  if computed.shape != recorded.shape:
    return _unequal(f"computed {computed.shape}, recorded {recorded.shape}")
  if recorded.dtype.kind in "US":
    wrong = float(np.sum(computed != recorded))
    return Verdict(wrong, wrong, wrong == 0)
  difference = np.abs(computed.astype(np.float64) - recorded.astype(np.float64))
  largest = float(np.abs(recorded.astype(np.float64)).max(initial=0.0))
  max_abs = float(difference.max(initial=0.0))
  scale = check.scale if check.scale is not None else largest
  max_rel = max_abs / scale if scale else max_abs
  if recorded.dtype.kind == "f":
    tolerance = GRADIENT if "grad" in name else ACTIVATION
    return Verdict(max_abs, max_rel, max_rel <= tolerance)
  if recorded.dtype == np.uint8 and not check.exact:
    close, equal = difference <= _LEVELS, difference == 0
    ok = np.mean(close) >= _PIXELS and np.mean(equal) >= _EQUAL
    return Verdict(max_abs, max_rel, bool(ok))
  wrong = difference != 0
  if check.margin is not None:
    wrong &= np.asarray(check.margin()).reshape(wrong.shape) >= MARGIN
  return Verdict(max_abs, max_rel, not wrong.any())


def subsample(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Takes every n-th entry along axes where the recorder kept fewer."""
  if array.ndim != len(shape):
    return array
  strides = []
  for have, want in zip(array.shape, shape, strict=True):
    stride = -(-have // want) if want else 1
    if want and -(-have // stride) != want:
      return array
    strides.append(slice(None, None, stride))
  return array[tuple(strides)]


def gradient_checks(
  golden: Golden,
  prefix: str,
  names: str,
  gradients: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, Check]:
  """Checks of `grad_norms`, `grad:*` and of the list of names.

  Args:
    golden: the folder.
    prefix: of the arrays, "out." or "out.CASE.".
    names: array that lists the parameters.
    gradients: gives the gradient of every tensor by PyTorch name.
  """
  checks = {}
  listed = [str(n) for n in golden[names]] if names in golden else []

  def norms():
    found = gradients()
    return np.array(
      [np.linalg.norm(found[n].astype(np.float64)) for n in listed]
    )

  checks[prefix + "grad_norms"] = Check(norms)
  # The same names; their order is the recorder's.
  checks[names] = Check(
    lambda: np.array([n if n in gradients() else "" for n in listed])
  )
  marker = prefix + "grad:"
  for array in golden.recorded:
    if array.startswith(marker):
      tensor = array.removeprefix(marker)
      checks[array] = Check(lambda tensor=tensor: gradients()[tensor])
  return checks


def torch_gradients(
  table: Table, gradients: nnx.State
) -> dict[str, np.ndarray]:
  """Gradients by PyTorch name, in PyTorch's shapes."""
  leaves = {
    path: leaf.get_value()
    for path, leaf in mapping.variables(gradients).items()
  }
  exported = mapping.Exported(table, leaves)
  return {name: exported.read(name) for name in mapping.places(table)}
