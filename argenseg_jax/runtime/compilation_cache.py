"""Compiled programs on disk, so that the next process need not compile them."""

import hashlib
import os
import pathlib
import platform
from typing import Any

import jax

# A directory for compiled programs instead of the usual one, or "off".
SWITCH = "ARGENSEG_COMPILATION_CACHE"


def enable() -> pathlib.Path | None:
  """Call before the first compilation; does nothing where it is switched off or
  JAX has a cache already (`JAX_COMPILATION_CACHE_DIR`).

  Returns:
    The directory in use; None without one.
  """
  asked = os.environ.get(SWITCH, "")
  settings: Any = jax.config  # JAX declares none of its own.
  if in_use := settings.jax_compilation_cache_dir:
    return pathlib.Path(in_use)
  if asked.lower() in ("off", "0"):
    return None
  try:
    directory = pathlib.Path(asked) if asked else _usual_directory()
  except RuntimeError:  # Neither HOME nor an entry for this user: no cache.
    return None
  # JAX itself makes the directory and warns where it cannot.
  jax.config.update("jax_compilation_cache_dir", str(directory))
  return directory


def _usual_directory() -> pathlib.Path:
  """One for each kind of machine that shares the cache."""
  return user_cache() / _machine()


def user_cache() -> pathlib.Path:
  """Our folder in the user's cache.

  Raises:
    RuntimeError: there is neither HOME nor an entry for this user.
  """
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "argenseg_jax"


def _machine() -> str:
  """Programs for CPUs use what the processor has, beyond its architecture."""
  flags = ""
  info = pathlib.Path("/proc/cpuinfo")
  if info.is_file():
    lines = info.read_text(errors="replace").splitlines()
    flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
  digest = hashlib.sha256(flags.encode()).hexdigest()[:8]
  return f"{platform.system()}-{platform.machine()}-{digest}".lower()
