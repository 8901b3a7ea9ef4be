"""How every parameter of the 8B model is split, on several meshes.

After a change that is meant: `python tests/sharding_golden_test.py`.
"""

import json
import pathlib

import jax
from flax import nnx

from argenseg_jax import construct, sharding, variants
from argenseg_jax.config import MeshConfig
from argenseg_jax.models.argenseg import ARGenSeg

PATH = pathlib.Path(__file__).parent / "golden" / "sharding_8b.json"
MESHES = {
  "fsdp 8": (1, 8, 1),
  "data 2, fsdp 4": (2, 4, 1),
  "2 x 2 x 2": (2, 2, 2),
}


def current() -> dict[str, dict]:
  """Path -> shape, partition, and the shape of a shard on each mesh."""
  model = construct.abstract(
    lambda: ARGenSeg(variants.get("argenseg_8b"), rngs=construct.Rngs(0))
  )
  state = nnx.state(model)
  found = {}
  for path, leaf in nnx.to_flat_state(state):
    entry = {"shape": list(leaf.shape)}
    found[".".join(map(str, path))] = entry
  for name, sizes in MESHES.items():
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    shardings = sharding.state_shardings(state, mesh)
    for path, leaf in nnx.to_flat_state(shardings):
      entry = found[".".join(map(str, path))]
      placed = leaf.get_value()
      entry["spec"] = str(tuple(placed.spec))
      entry[name] = list(placed.shard_shape(tuple(entry["shape"])))
  return found


def as_text(found: dict[str, dict]) -> str:
  """JSON of one parameter a line."""
  lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()]
  return "{\n" + ",\n".join(lines) + "\n}\n"


def test_every_parameter_is_split_as_recorded():
  assert json.loads(as_text(current())) == json.loads(PATH.read_text())


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  PATH.write_text(as_text(current()))
