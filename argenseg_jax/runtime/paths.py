"""Paths on a disk and in a bucket: the one place that knows the difference."""

import base64
import contextlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import fsspec
import fsspec.config as fsspec_config
from etils import epath
from etils.epath import gpath

from argenseg_jax.config import ConfigError

# What has `read_bytes`, `/`, `parent`, `glob`, `is_file` and the like.
Path = pathlib.Path | epath.Path

# TensorStore and other hosts write what a kept listing would not show.
fsspec_config.conf.setdefault("gcs", {})["use_listings_cache"] = False
# It logs what it tries again, and what it raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def _glob_below(
  self: gpath.PosixGPath, pattern: str
) -> Iterator[gpath.PosixGPath]:
  """etils takes the name of the folder itself for a pattern: below one with "["
  or a backslash Orbax would find nothing of what it has written."""
  if is_address(os.fspath(self)):
    return _glob(self, pattern)
  found = pathlib.Path(os.fspath(self)).glob(pattern)
  return (type(self)(path) for path in found)


_glob = gpath.PosixGPath.glob
gpath.PosixGPath.glob = _glob_below


class Entry(NamedTuple):
  """A file of a folder.

  Attributes:
    size: bytes.
    modified: seconds since 1970.
    version: changes whenever the file is written.
    md5: hexadecimal, where a bucket keeps it; else "".
  """

  size: int
  modified: float
  version: str
  md5: str


def as_path(name: str | Path) -> Path:
  """A local path, or one of a bucket for names such as "gs://bucket/file".

  Raises:
    ConfigError: nothing is installed that reads such a bucket, or it refuses.
  """
  if not is_address(name):
    return _at_home(pathlib.Path(name))
  try:
    path = epath.Path(name)
    path.exists()
  except Exception as error:  # Each bucket's client has errors of its own.
    raise ConfigError(
      f"cannot reach {name}: {said(error)} (gs:// needs the package gcsfs and "
      "credentials, `gcloud auth application-default login`)."
    ) from error
  return path


def is_address(name: str | Path) -> bool:
  """Whether it names something in a bucket."""
  return "://" in str(name)


def _at_home(path: pathlib.Path) -> pathlib.Path:
  """Shells leave a "~" behind an equals sign as it is."""
  if path.parts[:1] != ("~",):
    return path
  try:
    return path.expanduser()
  except RuntimeError as error:
    raise ConfigError(
      f"{path}: this process has no home folder; give the whole path, or set "
      "HOME."
    ) from error


def said(error: Exception) -> str:
  """The first line of an error, without its full stop."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0].rstrip(".")


def disk_path(name: str | Path) -> pathlib.Path:
  """A path for what can only be written to a disk.

  Raises:
    ConfigError: it is the address of a bucket.
  """
  if is_address(name):  # As a path, it would be a folder of that name.
    raise ConfigError(
      f"{name} is an address, and this is written to a disk only; name a "
      "folder or file there and copy it to the bucket afterwards."
    )
  return _at_home(pathlib.Path(name))


def is_local(path: Path) -> TypeGuard[pathlib.Path]:
  """Whether the file is on a disk of this machine."""
  return isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
  """The path, whatever folder the process is in; an address is so already."""
  return path.absolute() if is_local(path) else path


def size(path: Path) -> int:
  """Bytes of a file."""
  found: Any = path.stat()
  return found.st_size if is_local(path) else found.length


def tree(folder: Path) -> dict[str, Entry]:
  """All files below a folder, by their names relative to it."""
  if is_local(folder):
    found = {}
    for path in folder.rglob("*"):
      if path.is_file():
        stat = path.stat()
        found[path.relative_to(folder).as_posix()] = Entry(
          stat.st_size, stat.st_mtime, str(stat.st_mtime_ns), ""
        )
    return found
  system, root = fsspec.url_to_fs(str(folder))
  return {
    name.removeprefix(f"{root}/"): Entry(
      info["size"],
      info["mtime"].timestamp(),
      info["generation"],
      base64.b64decode(info.get("md5Hash", "")).hex(),
    )
    for name, info in system.find(root, detail=True).items()
    if info["type"] == "file"
  }


@contextlib.contextmanager
def fetched(folder: Path) -> Iterator[pathlib.Path]:
  """The folder if it is on a disk, else a copy of it there for a while."""
  if is_local(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="argenseg-") as scratch:
    copied = pathlib.Path(scratch) / folder.name
    if folder.is_dir():
      copy_tree(folder, copied)
    yield copied


def copy(source: Path, target: Path) -> None:
  """Copies a file, piece by piece."""
  if is_local(source) and is_local(target):
    shutil.copyfile(source, target)
    return
  with source.open("rb") as reader, target.open("wb") as writer:
    shutil.copyfileobj(reader, writer, 1 << 20)


def copy_tree(source: Path, target: Path) -> None:
  """Copies all files below a folder to another."""
  for name in tree(source):
    if is_local(target):
      (target / name).parent.mkdir(parents=True, exist_ok=True)
    copy(source / name, target / name)


def move(source: Path, target: Path) -> None:
  """Gives a folder another name; a bucket copies its files and deletes them."""
  if is_local(source):
    source.rename(target)
    return
  system, root = fsspec.url_to_fs(str(source))
  system.copy(root, str(target), recursive=True)
  system.rm(root, recursive=True)


def read_json(path: Path) -> dict[str, Any] | None:
  """The JSON object that a run left in a file; None where there is none, or
  only a part of one: then it is made again."""
  try:
    found = json.loads(path.read_text())
  except (FileNotFoundError, ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def write_whole(path: Path, text: str, *, durable: bool = True) -> None:
  """Writes a file that is there with all its text, or not at all.

  Args:
    path: of the file; `PATH.new` is used on the way, on a disk.
    text: all of it.
    durable: wait until it is on disk.
  """
  if not is_local(path):
    path.write_text(text)  # As a bucket always does.
    return
  new = path.with_name(f"{path.name}.new")
  with new.open("w") as file:
    file.write(text)
    if durable:
      file.flush()
      os.fsync(file.fileno())
  new.replace(path)
