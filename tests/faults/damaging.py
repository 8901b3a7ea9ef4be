"""What happens to files of a checkpoint, and a state to put into one."""

import jax.numpy as jnp
from flax import nnx


def state(value):
  return nnx.State({"kernel": nnx.Param(jnp.full((64, 3), value))})


def largest(step):
  files = [p for p in (step / "model").rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip_bit(step):
  path = largest(step)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def truncate(step):
  path = largest(step)
  path.write_bytes(path.read_bytes()[:-1])
