"""ARGenSeg in JAX: segmentation by generating the codes of a mask image."""

from typing import TYPE_CHECKING, Any

from argenseg_jax.version import __version__

if TYPE_CHECKING:
  from argenseg_jax.inference.predictor import Predictor

__all__ = ["Predictor", "__version__"]


def __getattr__(name: str) -> Any:
  if name == "Predictor":  # Imports jax: only where it is asked for.
    from argenseg_jax.inference.predictor import Predictor

    return Predictor
  raise AttributeError(f"module 'argenseg_jax' has no attribute {name!r}")
