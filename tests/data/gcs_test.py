"""Sources read from a bucket what they read from a disk."""

import dataclasses
import pickle

import fsspec
import pytest
from data import layouts
from fsspec.implementations.memory import MemoryFileSystem

from argenseg_jax.config import ConfigError, DataConfig
from argenseg_jax.data.errors import DataError
from argenseg_jax.data.sources.registry import open_source

BUCKET = "gs://bucket/data"


class _Bucket(MemoryFileSystem):
  """Keeps what is under gs:// in memory."""

  protocol = ("gs", "gcs")
  store = {}
  pseudo_dirs = [""]

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).removeprefix("gs://").strip("/")

  def glob(self, path, **kwargs):
    return [found.lstrip("/") for found in super().glob(path, **kwargs)]


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
  for name in ("gs", "gcs"):
    fsspec.register_implementation(name, _Bucket, clobber=True)
  yield _Bucket(finalize_on_close=True)
  _Bucket.store.clear()


# Parquet files are read from a disk only; a sentence says so.
@pytest.mark.parametrize("layout", sorted({*layouts.LAYOUTS} - {"refcoco_m"}))
def test_layouts_of_a_bucket(layout, bucket, tmp_path):
  keys = layouts.write(layout, tmp_path)
  for file in tmp_path.rglob("*"):
    if file.is_file():
      name = file.relative_to(tmp_path).as_posix()
      bucket.pipe(f"{BUCKET}/{name}", file.read_bytes())
  config = DataConfig(**keys)
  local = open_source(config)
  there = config.path.replace(str(tmp_path), BUCKET)
  source = open_source(dataclasses.replace(config, path=there))
  source = pickle.loads(pickle.dumps(source))
  assert source.fingerprint == local.fingerprint
  assert len(source) == len(local)
  for mine, wanted in zip(source, local, strict=True):
    if mine.options:
      mine, wanted = mine.choose(0), wanted.choose(0)
    for i in range(len(wanted.images)):
      assert (mine.load_image(i) == wanted.load_image(i)).all()
    if mine.target == "mask":
      for i in range(len(wanted.seg_masks)):
        assert (mine.load_seg_mask(i) == wanted.load_seg_mask(i)).all()


def test_what_a_bucket_cannot_do_is_said():
  with pytest.raises(DataError, match=r"cannot read gs://bucket/data/no\.json"):
    open_source(DataConfig(path=f"{BUCKET}/no.jsonl", source="jsonl"))
  with pytest.raises(ConfigError, match="cannot reach ftp://x/y: "):
    open_source(DataConfig(path="ftp://x/y", source="jsonl"))
