"""Which implementation runs where."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from argenseg_jax.kernels import dispatch
from argenseg_jax.kernels.chips import CHIPS, blocks, name_of
from argenseg_jax.kernels.nearest_code import nearest_code

OPS = ["linear_cross_entropy", "nearest_code", "scale_prediction"]


def described(kind, *, devices=1, axis_type=AxisType.Auto):
  """A mesh of a chip that is not here."""
  platform = "tpu" if kind.startswith("TPU") else "gpu"
  return jax.sharding.use_abstract_mesh(
    AbstractMesh(
      (devices,),
      ("x",),
      axis_types=(axis_type,),
      abstract_device=AbstractDevice(kind, None, platform),
    )
  )


def file_of(module):
  return module.__name__.rpartition(".")[2]


@pytest.mark.parametrize("op", OPS)
def test_platform_decides(op):
  assert file_of(dispatch.load(op, None)) == "xla"
  with described("TPU v5 lite"):
    assert file_of(dispatch.load(op, None)) == "pallas_tpu"
    assert file_of(dispatch.load(op, "reference")) == "reference"
  with described("NVIDIA H100 80GB HBM3"):
    won = "xla" if op == "scale_prediction" else "pallas_hopper"
    assert file_of(dispatch.load(op, None, width=128)) == won
    assert file_of(dispatch.load(op, None, width=72)) == "xla"
    assert file_of(dispatch.load(op, None, dtype="float32")) == "xla"
    assert file_of(dispatch.load(op, "gpu")) == "pallas_hopper"
  with described("NVIDIA A100-SXM4-80GB"):
    assert file_of(dispatch.load(op, None)) == "xla"
  with described("NVIDIA H100 80GB HBM3", devices=2):
    assert file_of(dispatch.load(op, None)) == "xla"


def test_partitioned_programs_take_xla():
  with described("TPU v5 lite", devices=4):
    assert file_of(dispatch.load("nearest_code", None)) == "xla"
  with described("TPU v5 lite", devices=4, axis_type=AxisType.Manual):
    assert file_of(dispatch.load("nearest_code", None)) == "pallas_tpu"


@pytest.mark.parametrize("op", OPS)
def test_unknown_implementations_raise(op):
  with pytest.raises(ValueError, match=f"{op} has no implementation 'cuda'"):
    dispatch.load(op, "cuda")


@pytest.mark.parametrize("op", OPS)
def test_gpu_kernels_need_a_hopper(op):
  for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200"):
    with (
      described(kind),
      pytest.raises(ValueError, match=f"{op} needs a Hopper GPU .*{kind}"),
    ):
      dispatch.load(op, "gpu")


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_a_kernel_that_cannot_run_raises(implementation):
  with pytest.raises(ValueError, match="interpret mode"):
    nearest_code(
      jnp.ones((9, 4)), jnp.ones((5, 4)), implementation=implementation
    )


def test_blocks_grow_with_the_chip():
  def bytes_needed(block):
    return 40_000 * block.tokens + 8 * 4096 * block.words

  with described("TPU v5 lite"):
    small = blocks(10_000, 10_000, bytes_needed)
  with described("TPU v6 lite"):
    large = blocks(10_000, 10_000, bytes_needed)
  assert bytes_needed(small) < 16 * 2**20
  assert small.tokens < large.tokens
  with described("TPU v9"):
    assert blocks(10_000, 10_000, bytes_needed) == small
  assert blocks(70, 50, bytes_needed) == (70, 50)


def test_chips_are_known_by_their_kind():
  assert name_of("TPU v5 lite") == "v5e"
  assert name_of("TPU v5") == "v5p"
  assert name_of("NVIDIA H100 80GB HBM3") == "h100"
  assert name_of("NVIDIA H100 PCIe") is None
  for chip in CHIPS.values():
    # FLOPs per byte of all of them; a slipped digit would show.
    assert 100 < chip.flops / chip.bandwidth < 600
